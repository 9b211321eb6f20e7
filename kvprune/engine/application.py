"""Applies a decision to a cache layer, and describes the result by columns for reports.

The decision is about new entries. Entries of earlier images are kept as long as decoding can see them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.engine.prefill import DecisionContext, Prefill
from kvprune.errors import UnsupportedCacheError
from kvprune.policy.base import CrossKVPolicy
from kvprune.tokens.decision import Decision
from kvprune.tokens.merging import Merge
from kvprune.tokens.reindexing import among_entries, anchors, of_columns, positions
from kvprune.tokens.selection import OWN_BITS, Selection

__all__ = ["apply", "attended_selection"]


def apply(
    policy: CrossKVPolicy,
    prefill: Prefill,
    context: DecisionContext,
    decision: Decision,
    warn: Callable[[str], None],
) -> None:
    """Apply a decision about one layer, and write down what the layer keeps.

    Args:
        policy: The policy that decided.
        prefill: The current prefill.
        context: The layer.
        decision: The decision, checked.
        warn: Called with a warning for the user.

    Raises:
        UnsupportedCacheError: If there is no cache, and the decision prunes nothing else.
    """
    layer, layer_idx, merge = context.layer, context.view.layer_idx, None
    if not prefill.cached:
        _require_onward(decision, policy, layer_idx)
    elif decision.cache is not None or not policy.keeps_invisible:
        if decision.cache is not None and decision.cache.quantizes and layer.keys.requires_grad:
            warn("quantized entries carry no gradient: backpropagation stops at them")
        merge = _retain(prefill, decision, context)  # with gradients, if they are recorded
    if decision.onward is not None:
        prefill.pass_on(decision.onward)
    kept = layer.selection()
    merge = _with_carried_bias(merge, layer, kept.indices, kept.valid, prefill.first_new)
    prefill.kept.add(layer_idx, context.attended, kept.with_merge(merge), layer.copies)
    if context.replaced is not None:
        prefill.kept.add_replaced(layer_idx, context.replaced.moved_by(prefill.first_new), layer.copies)


def _retain(prefill: Prefill, decision: Decision, context: DecisionContext) -> Merge | None:
    """Drop the entries of a layer that a decision does not keep; return the merge by columns, if any."""
    layer, selection = context.layer, decision.cache
    if selection is not None and selection.merge is not None:
        return _retain_merged(prefill, decision, selection, context)
    if selection is not None and _is_final(prefill, selection, context):
        layer.retain(selection)
        return None
    kept = _kept(prefill, decision, context)
    layer.retain(Selection.from_mask(kept, _bits(decision, layer, context.first)))
    return None


def _is_final(prefill: Prefill, selection: Selection, context: DecisionContext) -> bool:
    """Whether a selection of the view's columns can be applied to the entries of the layer as it is.

    Not if the layer holds earlier images, and not if the selection keeps columns that decoding cannot see: a
    sample without an image selects a placeholder column, which is dropped here.
    """
    if context.first or selection.indices.device != context.layer.keys.device:
        return False
    visible = context.view.visibility.by_column(prefill.visibility.decode_units)  # [R, S]
    heads = selection.indices.shape[1]
    by_head = visible.to(selection.indices.device)[:, None].expand(-1, heads, -1)  # [R, H or 1, S]
    return bool((by_head.gather(-1, selection.indices) | ~selection.valid).all())


def _retain_merged(
    prefill: Prefill, decision: Decision, selection: Selection, context: DecisionContext
) -> Merge | None:
    """Drop entries of a layer as decided, and merge the dropped ones into the kept ones."""
    layer = context.layer
    slots, valid = layer.entries()
    kept = _kept(prefill, decision, context)  # [R, H or 1, K]
    merge = among_entries(selection, kept, context.first)
    places = Selection.from_mask(kept)
    layer.retain(places.with_merge(merge))
    return None if merge is None else of_columns(merge, slots, valid, layer.columns)


def _kept(prefill: Prefill, decision: Decision, context: DecisionContext) -> Tensor:
    """Return which of the K entries of a layer are kept, bool ``[R, H or 1, K]``; only valid ones."""
    layer, first = context.layer, context.first
    device = layer.keys.device
    decodable = prefill.visibility.decode_units  # [R, U]
    new = context.view.visibility.by_column(decodable)[:, None].to(device)  # [R, 1, S]
    if decision.cache is not None:
        new = new & decision.cache.mask.to(device)
    if first:
        # Entries of earlier images are kept as long as decoding can see them.
        slots = layer.entries()[0][..., :first].to(prefill.visibility.units.device)  # [R, H or 1, first]
        batch, heads, _ = slots.shape
        units = prefill.visibility.units[:, None].expand(batch, heads, -1).gather(-1, slots)  # of each entry
        old = decodable[:, None].expand(-1, heads, -1).gather(-1, units).to(device)  # [R, H, first]
        width = max(heads, new.shape[1])
        new = torch.cat([old.expand(-1, width, -1), new.expand(-1, width, -1)], dim=-1)
    return new if layer.valid is None else new & layer.valid


def _bits(decision: Decision, layer: CrossKVLayer, first: int) -> Tensor | None:
    """Return the bits of each entry after a decision, uint8 ``[R, H or 1, K]``; None without quantization."""
    if decision.cache is None or decision.cache.bits is None:
        return None
    new = decision.cache.bits_by_column().to(layer.keys.device)  # [R, H or 1, S]
    old = torch.full((*new.shape[:2], first), OWN_BITS, dtype=torch.uint8, device=new.device)
    return torch.cat([old, new], dim=-1)


def attended_selection(layer: CrossKVLayer, received: Selection | None, first_new: int) -> Selection:
    """Return the columns that a layer attended to in prefill, with merges and the bias of old entries.

    Args:
        layer: Updated with the new columns.
        received: Columns that arrived at the layer, with the merge of their features; None for all.
        first_new: The first column that is new.
    """
    now = layer.selection()
    merge = None
    if received is not None and received.merge is not None:
        into = positions(now)  # [R, H or 1, S]
        takers = anchors(received).expand(-1, into.shape[1], -1)  # column that takes each new one; -1: none
        new = torch.where(takers < 0, -1, into.gather(-1, takers.clamp(min=0) + first_new))
        weights = torch.ones_like(into, dtype=received.merge.weights.dtype)
        weights[..., first_new:] = received.merge.weights
        merge = Merge(torch.cat([into[..., :first_new], new], -1), weights)
    merge = _with_carried_bias(merge, layer, now.indices, now.valid, first_new)
    return now.with_merge(merge)


def _with_carried_bias(
    merge: Merge | None, layer: CrossKVLayer, slots: Tensor, valid: Tensor, first_new: int
) -> Merge | None:
    """Return a merge for a report, with the logit bias that entries of earlier images carry.

    Args:
        merge: Of this prefill, by column; None if it merges nothing.
        layer: The cache layer.
        slots: int64 ``[R, H or 1, K]``, the columns of the reported entries.
        valid: bool, same shape; false at padding.
        first_new: The first column that is new.
    """
    if layer.bias is None or first_new == 0:
        return merge
    held_slots, held_valid = layer.entries()
    # [R, H or 1, S + 1]: padding may name any column, so its bias goes to one beyond the last.
    by_column = torch.zeros(*slots.shape[:2], layer.columns + 1, dtype=layer.bias.dtype, device=slots.device)
    by_column.scatter_(-1, torch.where(held_valid, held_slots, layer.columns), layer.bias)
    carried = by_column.gather(-1, slots).masked_fill(~valid | (slots >= first_new), 0)
    if merge is None:  # a merge in which each entry stands for itself alone
        own = torch.arange(slots.shape[-1], device=slots.device).expand_as(slots)
        ones = torch.ones_like(own, dtype=torch.float64)
        merge = of_columns(Merge(own, ones), slots, valid, layer.columns)
    return replace(merge, carried=carried)


def _require_onward(decision: Decision, policy: CrossKVPolicy, layer_idx: int) -> None:
    """Raise if a decision has no effect because the model was called without a cache.

    Raises:
        UnsupportedCacheError: Naming the policy and the layer.
    """
    if decision.cache is not None and decision.onward is None:
        raise UnsupportedCacheError(
            f"policy {policy.spec} prunes the cache of layer {layer_idx} after its attention, but "
            "the model was called without a cache (use_cache=False, or gradient checkpointing), so "
            "nothing would be pruned; call it with use_cache=True (labels= turns the cache off: pass "
            "decoder_input_ids instead), or choose a policy that decides onward (trim, or reach=onward)"
        )
    if decision.cache is not None and decision.cache.quantizes:
        raise UnsupportedCacheError(
            f"policy {policy.spec} quantizes the cache of layer {layer_idx}, but the model was "
            "called without a cache (use_cache=False, or gradient checkpointing), so nothing would be "
            "quantized; call it with use_cache=True"
        )
