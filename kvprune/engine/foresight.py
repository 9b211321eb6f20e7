"""Asks a `DecodePolicy` for a step that has not begun, so that its entries can be fetched from host memory.

Such a policy is shown no queries, keys or values, whether it is asked ahead or in the step: the first step
after a prompt, and one after a change of rows or number, are asked for when they begin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.cache.host_memory import Courier, Staged
from kvprune.errors import PolicyFailedError, UnsupportedCacheError
from kvprune.policy.decode import DecodePolicy
from kvprune.policy.step_view import StepView

__all__ = ["foreseen", "mask_has_changed", "next_step", "off_load", "shown", "unseen"]


def off_load(
    policy: DecodePolicy, layer: CrossKVLayer, courier: Courier, warn: Callable[[str], None]
) -> None:
    """Move a layer's entries to host memory, if the policy asks for it.

    Args:
        policy: The policy.
        layer: The layer after a prefill.
        courier: Makes the copies that decode steps read.
        warn: Gets a warning if this saves nothing.

    Raises:
        UnsupportedCacheError: See `CrossKVLayer.to_host`.
    """
    if not policy.offloads:
        return
    if layer.place.type == "cpu":
        warn(f"policy {policy.name!r} off-loads, but the model decodes in host memory: this saves no memory")
    layer.to_host(courier)


def shown(layer: CrossKVLayer) -> tuple[Tensor, Tensor]:
    """Return the keys and values of a step's view; without numbers if they lie in host memory."""
    if layer.host is None:
        return layer.assembled()
    shapes = ((side.shape, side.dtype) for side in (layer.keys, layer.values))
    keys, values = (torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes)
    return keys, values


def unseen(step: StepView, layer: CrossKVLayer) -> StepView:
    """Return what a policy is shown of a step: no queries if it must choose without them."""
    return step if layer.host is None else replace(step, queries_of=_no_queries(step), _queries=[])


def next_step(step: StepView, layer: CrossKVLayer) -> StepView:
    """Return the view of the step after one that has been taken, as if its mask were the same."""
    assert layer.steps is not None
    return replace(step, taken=layer.steps.taken_eagerly, _made=[], _limited=[], _highest=[])


def _no_queries(step: StepView) -> Callable[[], Tensor]:
    def refuse() -> Tensor:
        raise PolicyFailedError(
            f"policy {step.policy_name!r} says foresees = True, but its attend asked for step.queries "
            f"{step.where}; while entries lie in host memory they are chosen before the step, from the state"
        )

    return refuse


def foreseen(layer: CrossKVLayer, step: StepView, text_rows: int) -> Staged | None:
    """Return what was chosen for a step before it began; None if nothing fits it."""
    if layer.host is None:
        return None
    if torch.compiler.is_compiling():
        raise UnsupportedCacheError(
            f"policy {step.policy_name!r} off-loads, which is not possible in compiled code; compile without "
            "offload"
        )
    staged = layer.host.staged
    assert layer.steps is not None
    if staged is not None and (
        text_rows > 1
        or staged.number != layer.steps.taken_eagerly
        or len(staged.answer.indices) != step.text_rows
        or staged.answer.columns != step.entries
    ):
        layer.host.staged = staged = None
    return staged


def mask_has_changed(staged: Staged, step: StepView) -> Tensor | None:
    """Return whether rows may read other entries than was known when they were chosen, bool ``[]``.

    None if it is known without a look that they may not.
    """
    if staged.readable is None and step.unrestricted:
        return None
    known = torch.ones_like(step.readable) if staged.readable is None else staged.readable
    return (known != step.readable).any()
