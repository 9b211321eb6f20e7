"""The weights that a run holds (`HeldWeights`), and the part of a view that hands them out (`Weighted`)."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from kvprune.errors import WeightsError
from kvprune.policy.captured import Captured
from kvprune.policy.weights import FRESH, SUFFIX, HasWeights, WeightsFile, read_tensors, read_weights
from kvprune.text import shown

__all__ = ["HeldWeights", "Weighted", "require_fit"]


class HeldWeights:
    """The weights that a run holds: read once, and once more for each device, in float32.

    Views have one, and policies ask for their weights by `View.weights`. Several threads may ask.

    Args:
        given: Tensors by name, by name of the policy, that are handed out instead of those of files: what is
            being trained. They may carry a gradient.
    """

    def __init__(self, given: Mapping[str, Mapping[str, Tensor]] | None = None) -> None:
        self._given = given or {}
        self._held: dict[tuple[HasWeights, torch.device, tuple[int | None, ...]], Mapping[str, Tensor]] = {}
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: Any) -> HeldWeights:
        """Return these themselves: a copy of a view reads the same weights."""
        return self

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors that are held now."""
        for held in tuple(self._held.values()):
            yield from held.values()

    def of(
        self, policy: HasWeights, device: torch.device, geometry: Mapping[str, int]
    ) -> Mapping[str, Tensor]:
        """Return the tensors of a policy by name, in float32 and on a device; read-only.

        Args:
            policy: The policy, which may be part of another one.
            device: The device of the view.
            geometry: What the view knows about the model.

        Raises:
            WeightsError: If they do not fit: their file has changed, or they were trained for another
                geometry, or their names or shapes are wrong.
        """
        if policy.name in self._given:
            return self._given[policy.name]
        known = tuple(geometry.get(key) for key in policy.trained_for)
        key = policy, device, known
        held = self._held.get(key)
        if held is None:
            with self._lock, torch.inference_mode(mode=False), torch.no_grad():
                held = self._held.get(key) or self._earlier(key) or self._load(policy, device, geometry)
                self._held[key] = held
        return held

    def _earlier(
        self, wanted: tuple[HasWeights, torch.device, tuple[int | None, ...]]
    ) -> Mapping[str, Tensor] | None:
        """Return what an earlier view got, which knew more about the same model: a step shows less."""
        if None not in wanted[2]:
            return None
        for key, held in self._held.items():
            if key[:2] == wanted[:2] and all(
                mine in (None, its) for mine, its in zip(wanted[2], key[2], strict=True)
            ):
                return held
        return None

    def _load(
        self, policy: HasWeights, device: torch.device, geometry: Mapping[str, int]
    ) -> Mapping[str, Tensor]:
        missing = [key for key in policy.trained_for if key not in geometry]
        if missing:
            raise WeightsError(
                f"policy {policy.name!r} has weights for one {missing[0]!r}, which is unknown at this moment "
                f"(known: {', '.join(geometry)}); ask for them in prefill first"
            )
        initial = policy.initial(geometry)
        path = policy.weights_path
        found = initial if path is None else _checked(policy, path, initial, geometry)
        moved = {name: tensor.to(device, torch.float32).detach() for name, tensor in found.items()}
        return MappingProxyType(moved)


class Weighted:
    """The part of a view that knows the model for which weights are trained, and returns weights."""

    held: HeldWeights
    num_layers: int
    captured: Captured

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        raise NotImplementedError

    @property
    def geometry(self) -> Mapping[str, int]:
        """What the view knows about the model, by name: what weights may be trained for.

        ``cross_layers`` L; ``feature_width`` C and ``question_width`` W if these are captured; at a layer
        also ``kv_heads`` Hkv, ``head_width`` D, and ``heads`` Hq if queries are captured.
        """
        keys, captured = getattr(self, "keys", None), self.captured
        axes: Mapping[str, tuple[Tensor | None, int]] = {
            "feature_width": (captured.features, -1),
            "question_width": (captured.question, -1),
            "kv_heads": (keys, 1),
            "head_width": (keys, -1),
            "heads": (captured.queries, 1),
        }
        known = {name: tensor.shape[axis] for name, (tensor, axis) in axes.items() if tensor is not None}
        return {"cross_layers": self.num_layers, **known}

    def weights(self, policy: HasWeights) -> Mapping[str, Tensor]:
        """Return the trained weights of a policy, by name, in float32 on the device of the view; read-only.

        Args:
            policy: A `TrainedPolicy`: ``view.weights(self)``.

        Raises:
            WeightsError: If they do not fit the policy or the model.
        """
        return self.held.of(policy, self.device, self.geometry)


def require_fit(policy: HasWeights, geometry: Mapping[str, int]) -> None:
    """Raise unless the weights of a policy were trained for a model like this, as far as that is known.

    Args:
        policy: The policy.
        geometry: What is known about the model, by the names of `View.geometry`.

    Raises:
        WeightsError: Says for which model they were trained, and how to train others.
    """
    if policy.weights_path is not None:
        _require_geometry(policy, read_weights(policy.weights_path), geometry)


def _require_geometry(policy: HasWeights, file: WeightsFile, geometry: Mapping[str, int]) -> None:
    for key in policy.trained_for:
        if key in geometry and file.geometry.get(key) != geometry[key]:
            options = ",".join(f"{name}={getattr(policy, name)}" for name in policy.trained_options)
            spec = f"{policy.name}:{options}" if options else policy.name
            raise WeightsError(
                f"the weights {shown(str(file.path))} of policy {policy.name!r} were trained for a model of "
                f"{key} {file.geometry.get(key, 'unknown')} ({file.trained_on}), but this model has "
                f"{geometry[key]}; train them for it (kvprune train {spec} --model MODEL --data "
                f"QUESTIONS.jsonl --out FILE{SUFFIX}), or take weights={FRESH}, which is untrained"
            )


def _checked(
    policy: HasWeights, path: Path, initial: Mapping[str, Tensor], geometry: Mapping[str, int]
) -> Mapping[str, Tensor]:
    """Return the tensors of a file.

    Raises:
        WeightsError: If they do not fit the policy or the model.
    """
    file = read_weights(path)
    where = f"the weights {shown(str(path))} of policy {policy.name!r}"
    if file.digest != policy.digest:
        raise WeightsError(
            f"{where} have changed: their digest is {file.digest}, but the policy was made with "
            f"{policy.digest}; make the policy again"
        )
    _require_geometry(policy, file, geometry)
    stat = path.stat()
    tensors = read_tensors(path, stat.st_mtime_ns, stat.st_size)[1]
    for name in sorted({*tensors, *initial}):
        if name not in tensors or name not in initial:
            has, right = ("lack", "has it") if name in initial else ("have", "has no such weights")
            raise WeightsError(f"{where} {has} the tensor {shown(name)}, but the policy {right}")
        if tensors[name].shape != initial[name].shape:
            raise WeightsError(
                f"{where} have the tensor {shown(name)} of shape {list(tensors[name].shape)}, expected "
                f"{list(initial[name].shape)}"
            )
        if not tensors[name].isfinite().all():
            raise WeightsError(f"{where} have the tensor {shown(name)}, which holds NaN or infinity")
    return tensors
