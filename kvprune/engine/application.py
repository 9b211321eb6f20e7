"""What a cache layer keeps of what it holds, once the policy has decided; and what is reported of it.

Entries of earlier images stay as long as decoding can see them; new ones as the decision says.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.engine.prefill import Asked, Prefill
from kvprune.tokens.decision import Decision
from kvprune.tokens.merging import Merge
from kvprune.tokens.reindexing import among_entries, anchors, of_columns, positions
from kvprune.tokens.selection import OWN_BITS, Selection
from kvprune.tokens.visibility import Visibility

__all__ = ["attended", "carrying", "retain"]


def retain(prefill: Prefill, decision: Decision, asked: Asked) -> Merge | None:
    """Let a layer keep what was decided; return what was merged, in terms of its columns."""
    layer, selection = asked.layer, decision.cache
    kept = _kept(prefill, decision, asked.view.visibility, layer, asked.first)
    if selection is None or selection.merge is None:
        layer.retain(kept, bits=_bits(decision, layer, asked.first))
        return None
    slots, valid = layer.entries()
    kept = kept & valid
    merge = among_entries(selection, kept, asked.first)
    layer.retain(kept, merge)
    return None if merge is None else of_columns(merge, slots, valid, layer.columns)


def _kept(
    prefill: Prefill, decision: Decision, arriving: Visibility, layer: CrossKVLayer, first: int
) -> Tensor:
    """Return which entries of a layer stay, bool ``[R, H or 1, K]``."""
    device = layer.keys.device
    decodable = prefill.visibility.decode_units
    new = arriving.by_column(decodable)[:, None].to(device)
    if decision.cache is not None:
        # A sample to which no image came selects a placeholder of what it cannot see; that goes here.
        new = new & decision.cache.to_mask().to(device)
    if first == 0:
        return new
    # Entries of earlier images stay as long as decoding can see them.
    slots = layer.entries()[0][..., :first].to(prefill.visibility.units.device)
    batch, heads, _ = slots.shape
    all_units = prefill.visibility.units[:, None].expand(batch, heads, -1)
    units = all_units.gather(-1, slots)
    old = decodable[:, None].expand(-1, heads, -1).gather(-1, units).to(device)
    width = max(heads, new.shape[1])
    return torch.cat([old.expand(-1, width, -1), new.expand(-1, width, -1)], dim=-1)


def _bits(decision: Decision, layer: CrossKVLayer, first: int) -> Tensor | None:
    """Return in which precision a layer holds its entries, uint8 ``[R, H or 1, K]``; None for its own."""
    if decision.cache is None or decision.cache.bits is None:
        return None
    new = decision.cache.bits_by_column().to(layer.keys.device)
    old = torch.full((*new.shape[:2], first), OWN_BITS, dtype=torch.uint8, device=new.device)
    return torch.cat([old, new], dim=-1)


def attended(layer: CrossKVLayer, received: Selection | None, first_new: int) -> Selection:
    """Return what a layer attends to in prefill: which features were merged, and which entries are biased."""
    now = layer.selection()
    merge = None
    if received is not None and received.merge is not None:
        into = positions(now)
        takers = anchors(received).expand(-1, into.shape[1], -1)
        new = torch.where(takers < 0, -1, into.gather(-1, takers.clamp(min=0) + first_new))
        weights = torch.ones_like(into, dtype=received.merge.weights.dtype)
        weights[..., first_new:] = received.merge.weights
        merge = Merge(torch.cat([into[..., :first_new], new], -1), weights)
    merge = carrying(merge, layer, now.indices, now.valid, first_new)
    return Selection.trusted(now.indices, now.valid, now.columns, merge, now.bits)


def carrying(
    merge: Merge | None, layer: CrossKVLayer, slots: Tensor, valid: Tensor, first_new: int
) -> Merge | None:
    """Return a merge for a report, with the bias that entries of earlier images have.

    Args:
        merge: Of columns, if this prefill merges any.
        layer: The cache layer.
        slots: The columns of the entries that are reported.
        valid: Which of these are valid.
        first_new: The first column that is new.
    """
    if layer.bias is None or first_new == 0:
        return merge
    held_slots, held_valid = layer.entries()
    by_column = torch.zeros(*slots.shape[:2], layer.columns + 1, dtype=layer.bias.dtype, device=slots.device)
    by_column.scatter_(-1, torch.where(held_valid, held_slots, layer.columns), layer.bias)
    carried = by_column.gather(-1, slots).masked_fill(~valid | (slots >= first_new), 0)
    if merge is None:
        own = torch.arange(slots.shape[-1], device=slots.device).expand_as(slots)
        ones = torch.ones_like(own, dtype=torch.float64)
        merge = of_columns(Merge(own, ones), slots, valid, layer.columns)
    return replace(merge, carried=carried)
