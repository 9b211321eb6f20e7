"""`TrainedPolicy`: the base class of policies with trained weights."""

from __future__ import annotations

import os
import sys
import typing
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

from torch import Tensor

from kvprune.errors import WeightsError
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.weights import DIGEST_DIGITS, FRESH, SUFFIX, WeightsFile, read_weights
from kvprune.text import printable, shown

__all__ = ["TrainedPolicy", "files_may_be_gone"]

_READS_FILES = ContextVar("kvprune_reads_files_of_weights", default=True)

_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
"""How names of files end that other programs keep weights in."""


@dataclass(frozen=True, kw_only=True)
class TrainedPolicy(CrossKVPolicy):
    """A policy that computes with trained weights: ``class Mine(TrainedPolicy, FeaturePolicy)``.

    The policy holds the name of the weights and their digest, not the tensors: those belong to the run, which
    reads them once. A view returns them: ``view.weights(self)["projection"]``. When the policy is made, the
    digest of the file is filled in, so specs, receipts and manifests name the weights, and a file that has
    changed is found out.

    Args:
        weights: A file in the safetensors format, or the short name of weights that come with the policy:
            "demo" is the file ``weights/NAME-demo.safetensors`` beside the module that defines it. "fresh"
            are the weights that training starts from, for a model of any geometry.
        digest: The first 12 hexadecimal digits of the file's SHA-256. If stated, the file must have it.

    Class attributes:
        trained_for: Properties of a model that the weights are made for, out of `View.geometry`; a property
            where they depend on options.
        trained_options: Options that the weights are made for; the file must have been trained with the same.
    """

    weights: str = "demo"
    digest: str = ""

    trained_options: ClassVar[tuple[str, ...]] = ()
    on_any_model = MappingProxyType({"weights": FRESH})

    @property
    def trained_for(self) -> tuple[str, ...]:
        """Properties of a model that the weights are made for, out of `View.geometry`."""
        return ()

    @abstractmethod
    def initial(self, geometry: Mapping[str, int]) -> Mapping[str, Tensor]:
        """Return the tensors that training starts from, by name, in float32 on the CPU; always the same.

        Files of weights must hold tensors of the same names and shapes.

        Args:
            geometry: Properties of the model, by name; those of `trained_for` are among them.
        """

    @property
    def weights_name(self) -> str:
        """Name of a file that comes with the policy, without its suffix; options may be part of it."""
        return f"{self.name}-{self.weights}"

    @property
    def weights_path(self) -> Path | None:
        """The file of the weights; None if they are fresh."""
        if self.weights == FRESH:
            return None
        if self.weights.endswith(SUFFIX):
            return Path(self.weights).expanduser()
        return _folder(type(self)) / f"{self.weights_name}{SUFFIX}"

    @property
    def weights_file(self) -> WeightsFile | None:
        """What the file of the weights says about itself; None if they are fresh, or if it may be gone.

        Raises:
            WeightsError: If there is no such file, it is not readable, or was trained for another policy, or
                with other options.
        """
        path = self.weights_path
        if path is None or (self.digest and not _READS_FILES.get()):
            return None
        if not path.exists():
            raise WeightsError(self._not_found(path))
        file = read_weights(path)
        if file.policy != self.name:
            raise WeightsError(
                f"the weights {shown(str(path))} are those of policy {shown(file.policy)}, not of "
                f"{self.name!r}"
            )
        for option in self.trained_options:
            own = getattr(self, option)
            if option in file.options and file.options[option] != own:
                raise WeightsError(
                    f"the weights {shown(str(path))} were trained with {option}={file.options[option]}, but "
                    f"the policy {self.name!r} has {option}={own}; state the former, or train others"
                )
        return file

    @property
    def shipped(self) -> Mapping[str, WeightsFile]:
        """The weights that come with the policy and fit its options, by the names that ``weights`` takes."""
        if self.weights.endswith(SUFFIX):
            return {}
        before, _, behind = self.weights_name.partition(self.weights)
        found = {}
        for path in sorted(_folder(type(self)).glob(f"{before}*{behind}{SUFFIX}")):
            file = read_weights(path)
            if all(file.options.get(name) == getattr(self, name) for name in self.trained_options):
                found[path.name.removeprefix(before).removesuffix(f"{behind}{SUFFIX}")] = file
        return found

    def _not_found(self, path: Path) -> str:
        """Return what is wrong with the name of weights that are nowhere, and what would be right."""
        folder, named = _folder(type(self)), Path(self.weights)
        right = (
            f"train some (docs/train.md), or take {FRESH}, which is untrained, or weights that come with it: "
        )
        right += _listed(folder, f"{self.name}-*{SUFFIX}")
        if self.weights.endswith(SUFFIX):
            told = f"there is no file of weights {shown(self.weights)} for policy {self.name!r}"
            return f"{told}{'' if path.is_absolute() else f' in {shown(os.getcwd())}'}; {right}"
        if len(named.parts) > 1 or named.suffix.lower() in (*_PICKLES, SUFFIX):
            return (
                f"the weights {shown(self.weights)} of policy {self.name!r} are no file that ends in "
                f"{SUFFIX}; kvprune reads the safetensors format only, because other formats can run code "
                f"when they are read; {right}"
            )
        return (
            f"policy {self.name!r} comes with no weights {shown(self.weights)}: there is no file "
            f"{shown(path.name)}; {right}"
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.digest and not _READS_FILES.get():
            return
        file = self.weights_file
        found = "" if file is None else file.digest
        if self.digest and file is None:
            raise WeightsError(
                f"policy {self.name!r} with weights={FRESH} reads no file, so it has no digest; got "
                f"digest={shown(self.digest)}"
            )
        if self.digest and self.digest != found:
            assert file is not None
            raise WeightsError(
                f"the weights {shown(str(file.path))} of policy {self.name!r} have the digest {found}, but "
                f"the spec asks for {shown(self.digest)} ({DIGEST_DIGITS} digits of the SHA-256): the file "
                "is another one, or has changed since"
            )
        object.__setattr__(self, "digest", found)


@contextmanager
def files_may_be_gone() -> Iterator[None]:
    """Make policies inside the block whatever became of the files of weights whose digest they state.

    Such a policy says what pruned a cache. Whoever asks for its weights is told what became of their file.
    """
    token = _READS_FILES.set(False)
    try:
        yield
    finally:
        _READS_FILES.reset(token)


def _listed(folder: Path, pattern: str) -> str:
    """Return the files of weights in a folder with the options that each was trained with, for a message."""
    found = []
    for path in sorted(folder.glob(pattern)):
        try:
            options = ", ".join(f"{name}={value}" for name, value in read_weights(path).options.items())
        except WeightsError:
            options = "damaged"
        found.append(f"{path.name} ({options})" if options else path.name)
    return printable(", ".join(found) or "none", 1000)


def _folder(cls: type[TrainedPolicy]) -> Path:
    """Return the folder of the weights that come with a class, or with the policy that it is derived from."""
    bases = [base for base in cls.__mro__ if issubclass(base, TrainedPolicy) and base is not TrainedPolicy]
    files = [getattr(sys.modules.get(base.__module__), "__file__", None) for base in bases]
    folders = [Path(typing.cast(str, file)).resolve().parent / "weights" for file in files if file]
    if not folders:
        raise WeightsError(
            f"policy {cls.name!r} is defined in no file, so no weights come with it; name a file ({SUFFIX}), "
            f"or {FRESH}"
        )
    return next((folder for folder in folders if folder.is_dir()), folders[0])
