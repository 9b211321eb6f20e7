"""Expresses selections and merges of one set of tokens in terms of another: received, cached, all."""

from __future__ import annotations

import torch
from torch import Tensor

from kvprune.tokens.merging import Merge
from kvprune.tokens.selection import Selection

__all__ = ["among_entries", "anchors", "compose", "of_columns", "positions"]


def positions(selection: Selection) -> Tensor:
    """Position of each kept column among the kept ones, int64 ``[B, H or 1, S]``; -1 where it is dropped."""
    kept = selection.to_mask()
    return torch.where(kept, kept.cumsum(-1) - 1, -1)


def anchors(selection: Selection) -> Tensor:
    """Column that stands for each column, int64 ``[B, H or 1, S]``; -1 where a column is dropped outright."""
    into = positions(selection) if selection.merge is None else selection.merge.into
    return torch.where(into < 0, -1, selection.indices.gather(-1, into.clamp(min=0)))


def compose(received: Selection | None, onward: Selection) -> Selection:
    """Express a selection among received columns in terms of all columns, merges included.

    Args:
        received: What a decision was made about; None if that was all columns.
        onward: The decision.

    Returns:
        A selection of its own tensors: it does not change with those of the policy.
    """
    columns = onward.columns if received is None else received.columns
    indices = onward.indices.clone() if received is None else received.indices.gather(-1, onward.indices)
    first, second = None if received is None else received.merge, onward.merge
    if first is None and second is None:
        return Selection.trusted(indices, onward.valid.clone(), columns)
    into = positions(onward) if second is None else second.into
    weights = torch.ones_like(into, dtype=torch.float64) if second is None else second.weights.double()
    if received is None:
        return Selection.trusted(indices, onward.valid.clone(), columns, Merge(into.clone(), weights.clone()))
    earlier = positions(received) if first is None else first.into
    passed = earlier.clamp(min=0)
    total = weights.gather(-1, passed)
    if first is not None:
        total = total * first.weights
    merge = Merge(torch.where(earlier < 0, -1, into.gather(-1, passed)), total)
    return Selection.trusted(indices, onward.valid.clone(), columns, merge)


def among_entries(selection: Selection, kept: Tensor, first: int) -> Merge | None:
    """Express the merge of a view's columns in terms of the entries of a cache layer.

    Args:
        selection: Of the view's columns, which are the layer's entries from ``first`` on.
        kept: bool ``[R, H or 1, K]``, the valid entries that stay.
        first: Entries of earlier images; they take no members.

    Returns:
        None if nothing is merged into an entry that stays, and none of them is weighted.
    """
    if selection.merge is None:
        return None
    heads = kept.shape[1]
    taken = anchors(selection).to(kept.device)
    earlier = torch.arange(first, device=kept.device).expand(taken.shape[0], heads, first)
    takers = torch.cat([earlier, torch.where(taken < 0, -1, taken + first).expand(-1, heads, -1)], dim=-1)
    own = torch.where(kept, kept.cumsum(-1) - 1, -1)
    into = torch.where(takers < 0, -1, own.gather(-1, takers.clamp(min=0)))
    weights = selection.merge.weights.to(kept.device).expand(-1, heads, -1)
    weights = torch.cat([torch.ones_like(earlier, dtype=weights.dtype), weights], dim=-1)
    if not bool((into != own).any() | ((weights != 1) & kept).any()):
        return None
    return Merge(into, weights, selection.merge.renormalize_keys, selection.merge.size_bias)


def of_columns(merge: Merge, slots: Tensor, valid: Tensor, columns: int) -> Merge:
    """Express a merge of entries in terms of the columns that they came from.

    Args:
        merge: Of entries.
        slots: int64 ``[R, H or 1, entries]``, the column of each entry.
        valid: bool, same shape.
        columns: Columns seen so far, S.
    """
    heads = merge.into.shape[1]
    # Entries that only pad repeat a column; what they say goes into one column too many.
    index = torch.where(valid, slots, columns).expand(-1, heads, -1)
    shape = (*index.shape[:2], columns + 1)
    into = torch.full(shape, -1, device=index.device).scatter_(-1, index, merge.into)[..., :columns]
    weights = torch.zeros(shape, dtype=merge.weights.dtype, device=index.device)
    weights = weights.scatter_(-1, index, merge.weights)[..., :columns]
    return Merge(into, weights, merge.renormalize_keys, merge.size_bias)
