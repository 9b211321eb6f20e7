"""Selections that merge, made from buckets: which kept column takes each column.

A bucket is named by its anchor, the kept column that stays in place of all its members. Buckets are tensors
of columns, int64 ``[B, H or 1, S]``; -1 is no bucket: such a column is dropped outright.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvprune.errors import SelectionError
from kvprune.merging import Merge
from kvprune.selection import Selection

__all__ = [
    "among_entries",
    "anchors",
    "compose",
    "merge_mean",
    "merge_weighted",
    "nearest",
    "of_columns",
    "positions",
]


def merge_mean(
    kept: Tensor, buckets: Tensor, *, renormalize_keys: bool = False, size_bias: bool = False
) -> Selection:
    """Return the selection in which each kept column becomes the plain mean of its bucket.

    Args:
        kept: bool ``[B, H or 1, S]``, the anchors.
        buckets: int64, same shape: the kept column that takes each column, or -1.
        renormalize_keys: See `Merge`.
        size_bias: See `Merge`.

    Raises:
        SelectionError: As `merge_weighted`.
    """
    counts = torch.zeros_like(buckets)
    counts.scatter_add_(-1, buckets.clamp(min=0), (buckets >= 0).to(torch.int64))
    weights = 1 / counts.gather(-1, buckets.clamp(min=0)).clamp(min=1).double()
    return merge_weighted(kept, buckets, weights, renormalize_keys=renormalize_keys, size_bias=size_bias)


def merge_weighted(
    kept: Tensor,
    buckets: Tensor,
    weights: Tensor,
    *,
    renormalize_keys: bool = False,
    size_bias: bool = False,
) -> Selection:
    """Return the selection in which each kept column becomes a weighted sum of its bucket.

    Args:
        kept: bool ``[B, H or 1, S]``, the anchors.
        buckets: int64, same shape: the kept column that takes each column, or -1.
        weights: float32 or float64, same shape.
        renormalize_keys: See `Merge`.
        size_bias: See `Merge`.

    Raises:
        SelectionError: If shapes differ, or a bucket is not named by a kept column in it (KV15).
    """
    selection = Selection.from_mask(kept)
    if buckets.dtype != torch.int64 or buckets.shape != kept.shape or weights.shape != kept.shape:
        raise SelectionError(
            f"KV15: buckets are int64 and weights numbers of the shape of kept {list(kept.shape)}, "
            f"got {buckets.dtype} {list(buckets.shape)} and {weights.dtype} {list(weights.shape)}"
        )
    own = positions(selection)
    columns = torch.arange(kept.shape[-1], device=kept.device)
    named = buckets.clamp(min=0, max=kept.shape[-1] - 1)
    into = torch.where(buckets >= 0, own.gather(-1, named), -1)
    if bool(((buckets >= 0) & ((into < 0) | (named != buckets))).any()):
        raise SelectionError("KV15: each bucket is named by the kept column that takes it; one is not kept")
    if bool((kept & (buckets != columns)).any()):
        raise SelectionError("KV15: a kept column is in its own bucket; one is not")
    merge = Merge(into, weights, renormalize_keys, size_bias)
    return Selection(selection.indices, selection.valid, selection.columns, merge)


def nearest(kept: Tensor, cells: Tensor) -> Tensor:
    """Return buckets: for each column the nearest kept one by index, of two equally near ones the lower.

    Args:
        kept: bool ``[B, H or 1, S]``.
        cells: int64 ``[B or 1, S]``, runs of columns that no bucket leaves, such as tiles; -1 for columns
            that join no bucket but their own.

    Returns:
        int64, shape of ``kept``; -1 also for a cell without a kept column.
    """
    columns = torch.arange(kept.shape[-1], device=kept.device)
    by_head = cells[:, None].expand_as(kept)
    far = 2 * kept.shape[-1]
    takes = kept & (by_head >= 0)
    lower = torch.where(takes, columns, -1).cummax(-1).values
    upper = torch.where(takes, columns, far).flip(-1).cummin(-1).values.flip(-1)

    def distance(anchor: Tensor) -> Tensor:
        there = anchor.clamp(min=0, max=kept.shape[-1] - 1)
        joins = (anchor == there) & (by_head >= 0) & (by_head.gather(-1, there) == by_head)
        return torch.where(joins, (columns - anchor).abs(), far)

    below, above = distance(lower), distance(upper)
    chosen = torch.where(below <= above, lower, upper)
    joined = torch.where(torch.minimum(below, above) < far, chosen, -1)
    return torch.where(kept, columns, joined)


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
