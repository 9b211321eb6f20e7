"""Checks what a `DecodePolicy` returns: shapes at once, and values without asking the device in a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from kvprune.errors import PolicyFailedError, SelectionError
from kvprune.policy.step_view import State, StepView
from kvprune.text import shown
from kvprune.tokens.selection import Selection

__all__ = [
    "EMPTY",
    "FLAWS",
    "HIDDEN",
    "MOVED",
    "UNDEFINED",
    "check_places",
    "check_state",
    "flaws",
    "reads_hidden",
]

FLAWS = (
    "KV03: it selects nothing for some row and head; each row reads at least one entry",
    "KV01: it selects entries that the layer does not hold, or that the row may not read; select from "
    "step.readable",
    "KV01: its entries are not strictly increasing, with valid ones first; step.best orders them",
    "step.best got NaN as the score of an entry that the row may read; scores are numbers or infinite",
    "the row may read other entries in this step than in the step before, but these were fetched already; "
    "leave out offload, or give each step the same mask over encoder tokens",
)
"""What can be wrong with the values of a selection, in the order of `flaws`, and with those of scores."""

EMPTY, HIDDEN, UNDEFINED, MOVED = 0, 1, 3, 4
"""The flaws that may need a look of their own: of a limit, of another mask than before, of scores, and of a
mask that changes after entries were fetched."""


def check_state(state: object, rows: int, where: str, before: State | None = None) -> State:
    """Refuse a state that a cache layer could not reorder, expand and reset.

    Args:
        state: The policy's answer.
        rows: Length of the first axis.
        where: Policy and moment, for messages.
        before: The state until now, whose names it must have; None for the first one.

    Raises:
        PolicyFailedError: Says what is wrong, and what would be right.
    """
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise PolicyFailedError(
            f"{where} returned the state {shown(state)}, expected tensors by name, such as "
            '{"bounds": tensor}, or {}'
        )
    for name, tensor in state.items():
        if tensor.ndim == 0 or tensor.shape[0] != rows:
            raise PolicyFailedError(
                f"{where} returned state[{name!r}] of shape {list(tensor.shape)}; the first axis of each "
                f"tensor is rows, {rows} here"
            )
    if before is not None and state.keys() != before.keys():
        raise PolicyFailedError(
            f"{where} returned a state with {sorted(state)}, but prepare made {sorted(before)}; a state "
            "keeps its names"
        )
    return cast(State, state)


def check_places(selection: object, step: StepView, where: str, columns: str = "entries") -> Selection:
    """Refuse a selection whose type, shape or device is wrong, without looking at its values.

    Args:
        selection: The policy's answer.
        step: The step.
        where: Policy, method and moment, for messages.
        columns: What is selected, for messages.

    Raises:
        SelectionError: If it is no selection of this shape, or merges or quantizes.
    """
    if not isinstance(selection, Selection):
        raise SelectionError(f"{where} returned {type(selection).__name__}, expected a Selection or None")
    places, valid, rows = selection.indices, selection.valid, step.text_rows
    shape = list(places.shape)
    if (
        selection.columns != step.entries
        or places.ndim != 3
        or shape[0] != rows
        or shape[1] not in (1, step.heads)
        or not 1 <= shape[2] <= step.entries
        or valid.shape != places.shape
    ):
        raise SelectionError(
            f"KV01: {where} selects {shape} out of {selection.columns} {columns}, expected "
            f"[{rows}, {step.heads} or 1, n] out of {step.entries}"
        )
    if places.dtype != torch.int64 or valid.dtype != torch.bool:
        raise SelectionError(
            f"KV01: {where} selects by {places.dtype} and {valid.dtype}, expected int64 and bool"
        )
    if places.device != step.device:
        raise SelectionError(
            f"KV01: {where} selects on {places.device}, but the entries are on {step.device}"
        )
    if selection.merge is not None or selection.bits is not None:
        raise SelectionError(f"KV01: {where} merges or quantizes, which only a prefill can; select entries")
    return selection


def flaws(selection: Selection, step: StepView) -> Tensor:
    """Return which of the first `FLAWS` a selection of the right shape has, bool ``[3]`` on its device."""
    places, valid = selection.indices, selection.valid  # [N, H or 1, n]
    heads = max(places.shape[1], step.readable.shape[1])
    inside = places.clamp(0, step.entries - 1).expand(-1, heads, -1)
    may = step.readable.expand(-1, heads, -1).gather(-1, inside)  # [N, H, n]
    held = may & ((places >= 0) & (places < step.entries))
    rises = (places.diff(dim=-1) > 0) | ~valid[..., 1:]
    first = valid[..., :-1] | ~valid[..., 1:]
    return torch.stack([~valid[..., 0].all(), (valid & ~held).any(), ~(rises & first).all()])


def reads_hidden(selection: Selection, step: StepView) -> Tensor:
    """Return whether entries that are held are hidden from a row that selects them, bool ``[]``."""
    heads = max(selection.indices.shape[1], step.readable.shape[1])
    places = selection.indices.expand(-1, heads, -1)
    may = step.readable.expand(-1, heads, -1).gather(-1, places)  # [N, H, n]
    return ~(may if selection.is_known_full else may | ~selection.valid).all()
