"""Applies a decision to a cache layer, and says in terms of columns what was done.

Entries of earlier images stay as long as decoding can see them; new ones as the decision says.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.engine.prefill import Asked, Prefill
from kvprune.errors import UnsupportedCacheError
from kvprune.policy.base import CrossKVPolicy
from kvprune.tokens.decision import Decision
from kvprune.tokens.merging import Merge
from kvprune.tokens.reindexing import among_entries, anchors, of_columns, positions
from kvprune.tokens.selection import OWN_BITS, Selection

__all__ = ["attended", "carrying", "require_onward", "retain"]


def retain(prefill: Prefill, decision: Decision, asked: Asked) -> Merge | None:
    """Let a layer keep what was decided; return what was merged, in terms of its columns."""
    layer, selection = asked.layer, decision.cache
    if selection is not None and selection.merge is not None:
        return _retain_merged(prefill, decision, selection, asked)
    if selection is not None and _is_final(prefill, selection, asked):
        layer.retain(selection)
        return None
    kept = _kept(prefill, decision, asked)
    layer.retain(Selection.from_mask(kept, _bits(decision, layer, asked.first)))
    return None


def _is_final(prefill: Prefill, selection: Selection, asked: Asked) -> bool:
    """Whether a selection of the view's columns says all there is to say about the entries of the layer.

    It does unless earlier images are held, or it keeps columns that decoding cannot see: a sample to which no
    image came selects a placeholder.
    """
    if asked.first or selection.indices.device != asked.layer.keys.device:
        return False
    visible = asked.view.visibility.by_column(prefill.visibility.decode_units)  # [R, S]
    by_head = visible.to(selection.indices.device)[:, None].expand(-1, selection.indices.shape[1], -1)
    return bool((by_head.gather(-1, selection.indices) | ~selection.valid).all())


def _retain_merged(prefill: Prefill, decision: Decision, selection: Selection, asked: Asked) -> Merge | None:
    """Let a layer keep what was decided, and merge what is dropped into it."""
    layer = asked.layer
    slots, valid = layer.entries()
    kept = _kept(prefill, decision, asked) & valid
    merge = among_entries(selection, kept, asked.first)
    places = Selection.from_mask(kept)
    layer.retain(places.with_merge(merge))
    return None if merge is None else of_columns(merge, slots, valid, layer.columns)


def _kept(prefill: Prefill, decision: Decision, asked: Asked) -> Tensor:
    """Return which entries of a layer stay, bool ``[R, H or 1, K]``."""
    layer, first = asked.layer, asked.first
    device = layer.keys.device
    decodable = prefill.visibility.decode_units  # [R, U]
    new = asked.view.visibility.by_column(decodable)[:, None].to(device)  # [R, 1, S]
    if decision.cache is not None:
        new = new & decision.cache.mask.to(device)
    if first:
        # Entries of earlier images stay as long as decoding can see them.
        slots = layer.entries()[0][..., :first].to(prefill.visibility.units.device)
        batch, heads, _ = slots.shape
        units = prefill.visibility.units[:, None].expand(batch, heads, -1).gather(-1, slots)
        old = decodable[:, None].expand(-1, heads, -1).gather(-1, units).to(device)  # [R, H, first]
        width = max(heads, new.shape[1])
        new = torch.cat([old.expand(-1, width, -1), new.expand(-1, width, -1)], dim=-1)
    return new if layer.valid is None else new & layer.valid


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


def require_onward(decision: Decision, policy: CrossKVPolicy, layer_idx: int) -> None:
    """Raise if a decision would change nothing, because there is no cache.

    Raises:
        UnsupportedCacheError: Naming the policy and the layer.
    """
    if decision.cache is not None and decision.onward is None:
        raise UnsupportedCacheError(
            f"policy {policy.spec} prunes the cache of layer {layer_idx} after its attention, but "
            "the model was called without a cache (use_cache=False, or gradient checkpointing), so "
            "nothing would be pruned; call it with use_cache=True, or choose a policy that decides "
            "onward (trim, or reach=onward)"
        )
    if decision.cache is not None and decision.cache.quantizes:
        raise UnsupportedCacheError(
            f"policy {policy.spec} quantizes the cache of layer {layer_idx}, but the model was "
            "called without a cache (use_cache=False, or gradient checkpointing), so nothing would be "
            "quantized; call it with use_cache=True"
        )
