"""Checks a policy's answer against the invariants before anything is applied."""

from __future__ import annotations

import torch
from torch import Tensor

from kvprune.errors import SelectionError
from kvprune.selection import Decision
from kvprune.view import LayerView

__all__ = ["check_decision"]


def check_decision(decision: object, view: LayerView, policy: str) -> None:
    """Refuse a decision that breaks KV01, KV03, KV04 or KV05, naming the policy and the layer.

    Args:
        decision: What the policy returned.
        view: What it decided about.
        policy: Its name.

    Raises:
        SelectionError: Citing the invariant.
    """
    where = f"policy {policy!r} at layer {view.layer_idx}"
    if not isinstance(decision, Decision):
        raise SelectionError(
            f"{where}: select returned {type(decision).__name__}, expected a Decision(cache=..., onward=...)"
        )
    batch, heads, columns, _ = view.keys.shape
    for what, selection, visible in (
        ("cache", decision.cache, view.visible),
        ("onward", decision.onward, view.visible_in_prefill),
    ):
        if selection is None:
            continue
        shape = list(selection.indices.shape)
        if selection.columns != columns or shape[0] != batch or shape[1] not in (1, heads):
            raise SelectionError(
                f"KV01: {where}: {what} selects {shape} out of {selection.columns} columns, expected "
                f"[{batch}, {heads} or 1, K] out of {columns}"
            )
        kept = selection.to_mask()
        visible = visible.to(kept.device)[:, None]
        sees = visible.any(-1, keepdim=True)
        hidden_kept = kept & ~visible & sees
        visible_dropped = visible & ~kept
        padding, starved = torch.stack(
            [
                (hidden_kept.any(-1) & visible_dropped.any(-1)).any(),
                _starved(view, kept, visible),
            ]
        ).tolist()
        if padding:
            raise SelectionError(
                f"KV04: {where}: {what} keeps columns that no row can see while it drops visible ones; "
                "select from view.visible (this layer's cache) or view.visible_in_prefill (onward)"
            )
        if starved:
            raise SelectionError(
                f"KV03: {where}: {what} keeps no column of a visibility group (an image that some text row "
                "attends to); keep at least one column of each group in view.groups, as scoring.keep_top does"
            )


def _starved(view: LayerView, kept: Tensor, visible: Tensor) -> Tensor:
    """Return whether some visibility group with visible columns keeps none of them (a bool scalar)."""
    groups = torch.where(visible[:, 0], view.groups.to(kept.device), -1)
    width = int(groups.max()) + 2
    slots = (groups + 1)[:, None].expand_as(kept)
    zeros = torch.zeros(*kept.shape[:2], width, dtype=torch.int64, device=kept.device)
    present = zeros.scatter_add(-1, slots, torch.ones_like(slots))
    survivors = zeros.scatter_add(-1, slots, kept.to(torch.int64))
    return ((present > 0) & (survivors == 0))[..., 1:].any()
