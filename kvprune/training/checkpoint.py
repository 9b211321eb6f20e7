"""Checkpoints: everything from which a training continues as if it had never stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvprune.errors import TrainingError
from kvprune.text import shown

__all__ = ["Checkpoint", "load", "save", "write_whole"]

_KIND = "kvprune training"


@dataclass
class Checkpoint:
    """A training between two steps.

    Attributes:
        settings: All that the training depends on, as JSON values.
        weights: What is trained, by name.
        first: First moments of AdamW, by name.
        second: Second moments of AdamW, by name.
        step: Number of steps done.
        best: The weights of the best validation so far, by name.
        best_step: After which step that was.
        curve: One row for each validation.
        pending: Losses of the steps since the last validation.
    """

    settings: Mapping[str, Any]
    weights: dict[str, Tensor]
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    step: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    best_step: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    pending: list[float] = field(default_factory=list)

    @property
    def is_stale(self) -> int:
        """Number of validations since the best one."""
        return sum(row["step"] > self.best_step for row in self.curve)


_PARTS = ("weights", "first", "second", "best")


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, whole or not at all."""
    from safetensors.torch import save as packed

    tensors = {
        f"{part}/{name}": tensor.detach().cpu().contiguous()
        for part in _PARTS
        for name, tensor in getattr(checkpoint, part).items()
    }
    told = {name: getattr(checkpoint, name) for name in ("settings", "step", "best_step", "curve", "pending")}
    write_whole(path, packed(tensors, {"kind": _KIND, "told": json.dumps(told)}))


def load(path: Path, device: torch.device) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        TrainingError: If the file is none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = file.metadata() or {}
            if header.get("kind") != _KIND:
                raise TrainingError(f"{shown(str(path))} is no checkpoint of `kvprune train`; move it away")
            told = json.loads(header["told"])
            parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
            for key in file.keys():  # noqa: SIM118  not a mapping
                part, _, name = key.partition("/")
                parts[part][name] = file.get_tensor(key)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise TrainingError(
            f"{shown(str(path))} is no checkpoint of `kvprune train`, or is damaged ({str(error)[:200]}); "
            "move "
            "it away"
        ) from error
    made: dict[str, Any] = {**told, **parts}
    return Checkpoint(**made)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all.

    Raises:
        TrainingError: If it cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise TrainingError(f"cannot write {shown(str(path))}: {error.strerror}") from error


def different(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Sequence[str]:
    """Return the names of settings that differ."""
    return [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
