"""Selections that merge, made from buckets: which kept column takes each column.

A bucket is named by its anchor, the kept column that stays in place of all its members. Buckets are tensors
of columns, int64 ``[B, H or 1, S]``; -1 is no bucket: such a column is dropped outright.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvprune.errors import SelectionError
from kvprune.tokens.merging import Merge
from kvprune.tokens.reindexing import positions
from kvprune.tokens.selection import Selection

__all__ = [
    "merge_mean",
    "merge_weighted",
    "nearest",
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
