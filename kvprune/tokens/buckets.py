"""Makes selections with a merge from buckets: sets of columns that are merged into one kept column.

The kept column of a bucket is its anchor. Buckets are an int64 tensor ``[B, H or 1, S]`` that holds for each
column the anchor of its bucket; -1 means that the column is dropped and merged into nothing.
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
    """Return the selection in which each kept column becomes the mean of its bucket.

    Args:
        kept: bool ``[B, H or 1, S]``, the anchors.
        buckets: int64, same shape: the anchor that each column is merged into, or -1.
        renormalize_keys: See `kvprune.tokens.merging.Merge`.
        size_bias: See `kvprune.tokens.merging.Merge`.

    Raises:
        SelectionError: As for `merge_weighted`.

    Example:
        >>> kept = torch.tensor([[[True, False, False, True]]])
        >>> selection = merge_mean(kept, torch.tensor([[[0, 0, -1, 3]]]))  # column 2 is dropped
        >>> selection.merge.weights.tolist()
        [[[0.5, 0.5, 0.5, 1.0]]]
        >>> selection.merge.into.tolist()
        [[[0, 0, -1, 1]]]
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
        buckets: int64, same shape: the anchor that each column is merged into, or -1.
        weights: float32 or float64, same shape.
        renormalize_keys: See `kvprune.tokens.merging.Merge`.
        size_bias: See `kvprune.tokens.merging.Merge`.

    Raises:
        SelectionError: If shapes differ, an anchor is not kept, or a kept column is not in its own bucket
            (KV15).
    """
    selection = Selection.from_mask(kept)
    if buckets.dtype != torch.int64 or buckets.shape != kept.shape or weights.shape != kept.shape:
        raise SelectionError(
            f"KV15: buckets (int64) and weights have the shape of kept {list(kept.shape)}, "
            f"got {buckets.dtype} {list(buckets.shape)} and {weights.dtype} {list(weights.shape)}"
        )
    own = positions(selection)  # [B, H or 1, S]
    columns = torch.arange(kept.shape[-1], device=kept.device)
    named = buckets.clamp(min=0, max=kept.shape[-1] - 1)
    into = torch.where(buckets >= 0, own.gather(-1, named), -1)  # [B, H or 1, S]
    if bool(((buckets >= 0) & ((into < 0) | (named != buckets))).any()):
        raise SelectionError("KV15: each column is merged into a kept column; a bucket's anchor is not kept")
    if bool((kept & (buckets != columns)).any()):
        raise SelectionError("KV15: a kept column is the anchor of its own bucket; one is in another bucket")
    merge = Merge(into, weights, renormalize_keys, size_bias)
    return selection.with_merge(merge)


def nearest(kept: Tensor, cells: Tensor) -> Tensor:
    """Return buckets that merge each column into the nearest kept column of its cell, by index.

    If two kept columns are equally near, the lower one is chosen.

    Args:
        kept: bool ``[B, H or 1, S]``.
        cells: int64 ``[B or 1, S]``, the cell of each column, for example its tile: a run of consecutive
            columns that are merged only with each other. Columns of cell -1 take no part.

    Returns:
        Buckets, int64, shape of ``kept``. Kept columns are their own anchors; -1 for dropped columns of
        cell -1 and of cells without a kept column.

    Example:
        >>> kept = torch.tensor([[[True, False, False, True, False]]])
        >>> nearest(kept, torch.tensor([[0, 0, 0, 0, 1]])).tolist()
        [[[0, 0, 3, 3, -1]]]
    """
    columns = torch.arange(kept.shape[-1], device=kept.device)
    by_head = cells[:, None].expand_as(kept)  # [B, H or 1, S]
    far = 2 * kept.shape[-1]
    anchors = kept & (by_head >= 0)
    lower = torch.where(anchors, columns, -1).cummax(-1).values  # the last anchor at or below each column
    upper = torch.where(anchors, columns, far).flip(-1).cummin(-1).values.flip(-1)  # the first at or above

    def distance(anchor: Tensor) -> Tensor:
        """Return the distance to an anchor, int64 ``[B, H or 1, S]``; ``far`` if it is in another cell."""
        there = anchor.clamp(min=0, max=kept.shape[-1] - 1)
        joins = (anchor == there) & (by_head >= 0) & (by_head.gather(-1, there) == by_head)
        return torch.where(joins, (columns - anchor).abs(), far)

    below, above = distance(lower), distance(upper)
    chosen = torch.where(below <= above, lower, upper)
    joined = torch.where(torch.minimum(below, above) < far, chosen, -1)
    return torch.where(kept, columns, joined)
