"""Finds policies that write to the tensors they are shown, which are the model's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor

from kvprune.errors import PolicyFailedError
from kvprune.policy.held_weights import HeldWeights

__all__ = ["unchanged"]

_WHOLE_NUMBERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def unchanged(policy: str, where: str, views: Sequence[object]) -> Iterator[None]:
    """Raise if a tensor of a view changes in this block.

    Compares version counters, which every operation in place raises. Tensors made in inference mode have
    none; a weighted sum of their bits is compared instead.

    Args:
        policy: Name of the policy that reads the views.
        where: Layer, for the message.
        views: Views, or parts of views: dataclasses that hold tensors.

    Raises:
        PolicyFailedError: Names the tensors.
    """
    shown = [(name, tensor) for view in views for name, tensor in _tensors(view, "view")]
    before = _state([tensor for _, tensor in shown])
    yield
    after = _state([tensor for _, tensor in shown])
    changed = sorted({name for (name, _), a, b in zip(shown, before, after, strict=True) if a != b})
    if changed:
        raise PolicyFailedError(
            f"policy {policy!r} changed {', '.join(changed)} in place {where}; a view shows the model's own "
            "tensors and is read-only: work on a copy, such as view.keys.clone()"
        )


def _tensors(view: object, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in a dataclass and in the dataclasses that it holds, with their names."""
    if isinstance(view, Tensor):
        yield name.replace(".captured.", "."), view
    elif isinstance(view, HeldWeights):
        for tensor in view.tensors():
            yield "view.weights", tensor
    elif is_dataclass(view) and not isinstance(view, type):
        for field in fields(view):
            yield from _tensors(getattr(view, field.name), f"{name}.{field.name}")


def _state(tensors: Sequence[Tensor]) -> list[int]:
    """Return a number for each tensor that changes with it; one device transfer in inference mode."""
    state = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
    summed = [place for place, tensor in enumerate(tensors) if tensor.is_inference()]
    if summed:
        device = tensors[summed[0]].device
        sums = torch.stack([_sum_of_bits(tensors[place]).to(device) for place in summed])
        for place, value in zip(summed, sums.tolist(), strict=True):
            state[place] = value
    return state


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor, as whole numbers, summed with weights by row and column, int64 ``[]``."""
    whole = tensor if tensor.dtype == torch.bool else tensor.view(_WHOLE_NUMBERS[tensor.element_size()])
    table = whole.reshape(-1, whole.shape[-1] if whole.ndim else 1)  # [N, D]
    return _weighted(table.sum(0, dtype=torch.int64)) + 3 * _weighted(table.sum(1, dtype=torch.int64))


def _weighted(sums: Tensor) -> Tensor:
    return (sums * torch.arange(1, len(sums) + 1, device=sums.device)).sum()
