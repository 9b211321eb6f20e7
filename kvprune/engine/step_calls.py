"""Calls a method of a `DecodePolicy`: what it raises names the policy, and writing to a view is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from kvprune.engine.prefill import DecisionContext
from kvprune.errors import KVPruneError, PolicyFailedError
from kvprune.policy.step_view import HeldView, StepView

__all__ = ["ask", "held_view"]

_Answer = TypeVar("_Answer")


def ask(name: str, where: str, question: Callable[[], _Answer], step: StepView | None = None) -> _Answer:
    """Return a policy's answer.

    Args:
        name: Name of the policy.
        where: Moment and layer, for messages.
        question: Calls the policy.
        step: The view that it is shown, if it is one of a step.

    Raises:
        PolicyFailedError: If the policy raises an error of its own, or writes to keys or values.
    """
    if torch.compiler.is_compiling():
        return question()
    shown = () if step is None else (step.keys, step.values)
    before = [tensor._version for tensor in shown if not tensor.is_inference()]
    try:
        answer = question()
    except (KVPruneError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise PolicyFailedError(
            f"policy {name!r} raised {type(error).__name__} {where}: {str(error)[:500]}"
        ) from error
    if before != [tensor._version for tensor in shown if not tensor.is_inference()]:
        raise PolicyFailedError(
            f"policy {name!r} changed keys or values in place {where}; a view shows the model's "
            "own tensors and is read-only: work on a copy"
        )
    return answer


def held_view(context: DecisionContext) -> HeldView:
    """Return what a layer holds after a prefill.

    Args:
        context: The layer after its attention, and its cache layer, pruned.
    """
    layer = context.layer
    keys, values = layer.assembled()
    slots, valid = layer.entries()
    return HeldView(
        layer=context.view,
        keys=keys,
        values=values,
        slots=slots,
        valid=valid,
        columns=layer.columns,
        earlier=None if layer.steps is None else dict(layer.steps.tensors),
        received=context.received,
    )
