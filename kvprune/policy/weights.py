"""Files of weights that policies name.

A file is in the safetensors format, so reading it runs no code. Its header says for which policy and which
geometry of a model the tensors were trained; `kvprune.policy.trained` has the base class of such policies.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from kvprune.errors import WeightsError
from kvprune.text import printable, shown

__all__ = [
    "DIGEST_DIGITS",
    "FRESH",
    "SUFFIX",
    "HasWeights",
    "WeightsFile",
    "read_tensors",
    "read_weights",
    "save_weights",
]

DIGEST_DIGITS = 12
"""Hexadecimal digits of the SHA-256 by which specs name a file of weights."""

FRESH = "fresh"
"""Names the tensors that training starts from, which fit any model."""

SUFFIX = ".safetensors"
"""How names of files of weights end."""


class HasWeights(Protocol):
    """What is read of a policy with weights; `kvprune.policy.TrainedPolicy` has all of it."""

    name: ClassVar[str]

    @property
    def trained_options(self) -> tuple[str, ...]:
        """Options that the weights are made for."""

    @property
    def weights(self) -> str:
        """Name of the weights."""

    @property
    def digest(self) -> str:
        """Digest of their file."""

    @property
    def trained_for(self) -> tuple[str, ...]:
        """Properties of a model that the weights are made for."""

    @property
    def weights_path(self) -> Path | None:
        """The file; None if the weights are fresh."""

    def initial(self, geometry: Mapping[str, int]) -> Mapping[str, Tensor]:
        """The tensors that training starts from."""


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights.

    Attributes:
        path: Where it is.
        digest: The first `DIGEST_DIGITS` hexadecimal digits of its SHA-256.
        policy: Name of the policy that it was trained for.
        geometry: Properties of the model that it was trained for, by name.
        options: Options of the policy that it was trained with, by name.
        training: How it was trained: a summary for readers.
    """

    path: Path
    digest: str
    policy: str
    geometry: Mapping[str, int]
    options: Mapping[str, Any]
    training: Mapping[str, Any]

    @property
    def model_digest(self) -> str | None:
        """What identifies the model that it was trained on, as `kvprune train` writes it; None if unknown."""
        settings = self.training.get("settings")
        found = settings.get("model_digest") if isinstance(settings, dict) else None
        return found if isinstance(found, str) else None

    @property
    def trained_on(self) -> str:
        """The model that it was trained on, for readers."""
        settings = self.training.get("settings")
        for told in (self.training, settings if isinstance(settings, dict) else {}):
            if isinstance(name := told.get("model"), str):
                return printable(name, 80)
        if self.model_digest:
            return f"a model with the digest {printable(self.model_digest[:19], 80)}"
        return "a model that it does not name"


def read_weights(path: Path) -> WeightsFile:
    """Read what a file of weights says about itself; the same file is read once in each process.

    Raises:
        WeightsError: If there is no such file, it is not safetensors, or its header lacks what kvprune needs.
    """
    try:
        stat = os.stat(path)
    except OSError as error:
        raise WeightsError(
            f"there is no file of weights {shown(str(path))} ({error.strerror}); train one with "
            "`kvprune train`, or name another one"
        ) from error
    return read_tensors(path, stat.st_mtime_ns, stat.st_size)[0]


def save_weights(
    path: Path,
    policy: HasWeights,
    tensors: Mapping[str, Tensor],
    geometry: Mapping[str, int],
    training: Mapping[str, Any],
) -> WeightsFile:
    """Write a file of weights, whole or not at all, and return what it says about itself.

    Args:
        path: Where; an existing file is replaced.
        policy: The policy that uses the weights, with the options that it was trained with.
        tensors: The weights by name.
        geometry: Properties of the model, by name, as `View.geometry` has them.
        training: A summary of the training, as JSON values.

    Raises:
        WeightsError: If the file name does not end in ``.safetensors``, or the file cannot be written.
    """
    from safetensors.torch import save

    if path.suffix != SUFFIX:
        raise WeightsError(f"a file of weights ends in {SUFFIX}, got {shown(str(path))}")
    header = {
        "policy": policy.name,
        "geometry": json.dumps({key: geometry[key] for key in policy.trained_for}),
        "options": json.dumps({name: getattr(policy, name) for name in policy.trained_options}),
        "training": json.dumps(dict(training), sort_keys=True),
    }
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(_in_order(save(plain, header)))
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise WeightsError(f"cannot write the weights to {shown(str(path))}: {error.strerror}") from error
    return read_weights(path)


def _in_order(data: bytes) -> bytes:
    """Return a safetensors file with its header in order, so that equal weights have equal digests."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


@functools.lru_cache(maxsize=32)
def read_tensors(path: Path, changed: int, size: int) -> tuple[WeightsFile, Mapping[str, Tensor]]:
    """Return header and tensors of a file; time of change and size say whether it is still the same."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    where = f"the file of weights {shown(str(path))}"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"{where} cannot be read: {error.strerror}") from error
    try:
        with torch.inference_mode(mode=False):
            tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    except (SafetensorError, ValueError, KeyError) as error:
        raise WeightsError(
            f"{where} is damaged, or is not in the safetensors format ({str(error)[:200]}); copy or train "
            "it again"
        ) from error
    parts: dict[str, Any] = {}
    for name in ("geometry", "options", "training"):
        try:
            parts[name] = json.loads(header[name])
        except (KeyError, ValueError):
            parts[name] = None
        if not isinstance(parts[name], dict):
            raise WeightsError(
                f"{where} does not say in its header for which {name} it was trained; kvprune reads the "
                "files that `kvprune train` writes (docs/train.md)"
            )
    digest = hashlib.sha256(data).hexdigest()[:DIGEST_DIGITS]
    return WeightsFile(path, digest, str(header.get("policy")), **parts), tensors
