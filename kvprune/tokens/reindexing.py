"""Re-expresses selections and merges in the numbering of another set of tokens.

There are three numberings: the columns that a layer receives, the entries that its cache holds, and the
columns of the unpruned cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvprune.tokens.merging import Merge
from kvprune.tokens.selection import Selection

__all__ = ["among_entries", "among_received", "anchors", "compose", "of_columns", "positions"]


def positions(selection: Selection) -> Tensor:
    """Return each column's position among the kept columns, int64 ``[B, H or 1, S]``; -1 if it is dropped.

    Example:
        >>> positions(Selection.from_mask(torch.tensor([[[False, True, True]]]))).tolist()
        [[[-1, 0, 1]]]
    """
    return positions_in(selection.mask)


def positions_in(kept: Tensor) -> Tensor:
    """Return each true element's position among those of its row, int64; -1 where ``kept`` is false."""
    return torch.where(kept, kept.cumsum(-1) - 1, -1)


def anchors(selection: Selection) -> Tensor:
    """Return the kept column that each column is merged into, int64 ``[B, H or 1, S]``; -1 for none."""
    into = positions(selection) if selection.merge is None else selection.merge.into
    return torch.where(into < 0, -1, selection.indices.gather(-1, into.clamp(min=0)))


def compose(received: Selection | None, onward: Selection) -> Selection:
    """Express a selection of received columns as a selection of all columns; merges are combined.

    Args:
        received: The columns that the policy saw; None if it saw all of them.
        onward: The selection that the policy made among them.

    Returns:
        A selection that shares no tensor with ``onward``, so the policy cannot change it later.
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
    passed = earlier.clamp(min=0)  # [B, H or 1, S], received column that column s was merged into
    total = weights.gather(-1, passed)
    if first is not None:
        total = total * first.weights
    merge = Merge(torch.where(earlier < 0, -1, into.gather(-1, passed)), total)
    return Selection.trusted(indices, onward.valid.clone(), columns, merge)


def among_received(slots: Tensor, received: Selection | None, first: int) -> Tensor:
    """Return the place of each entry's column among those that a layer received, int64; -1 for earlier ones.

    Needs no device transfer.

    Args:
        slots: int64 ``[R, H or 1, K]``, columns of the unpruned cache, each of which the layer received.
        received: The new columns that the layer received, ``[R, 1, n]`` out of the new ones; None for all.
        first: The first new column.

    Example:
        >>> received = Selection.from_mask(torch.tensor([[[True, False, True, True]]]))
        >>> among_received(torch.tensor([[[1, 10, 13]]]), received, first=10).tolist()
        [[[-1, 0, 2]]]
    """
    new = slots - first
    if received is None:
        return new.clamp(min=-1)
    known = received.indices.to(slots.device).expand(-1, slots.shape[1], -1)  # increasing; padding repeats
    found = torch.searchsorted(known.contiguous(), new.contiguous())
    return torch.where(new < 0, -1, found.clamp(max=known.shape[-1] - 1))


def among_entries(selection: Selection, kept: Tensor, first: int) -> Merge | None:
    """Express the merge of a view's columns as a merge of the entries of a cache layer.

    Args:
        selection: A selection of the view's columns, which are the layer's entries from ``first`` on.
        kept: bool ``[R, H or 1, K]``, the valid entries that stay.
        first: Number of entries of earlier images. Nothing is merged into them.

    Returns:
        The merge; None if it changes nothing (no entry has another member, and all weights are 1).
    """
    if selection.merge is None:
        return None
    heads = kept.shape[1]
    taken = anchors(selection).to(kept.device)  # [B, H or 1, S]
    earlier = torch.arange(first, device=kept.device).expand(taken.shape[0], heads, first)
    takers = torch.cat([earlier, torch.where(taken < 0, -1, taken + first).expand(-1, heads, -1)], dim=-1)
    own = positions_in(kept)  # [R, H or 1, K]
    into = torch.where(takers < 0, -1, own.gather(-1, takers.clamp(min=0)))
    weights = selection.merge.weights.to(kept.device).expand(-1, heads, -1)
    weights = torch.cat([torch.ones_like(earlier, dtype=weights.dtype), weights], dim=-1)
    if not bool((into != own).any() | ((weights != 1) & kept).any()):
        return None
    return Merge(into, weights, selection.merge.renormalize_keys, selection.merge.size_bias)


def of_columns(merge: Merge, slots: Tensor, valid: Tensor, columns: int) -> Merge:
    """Express a merge of cache entries as a merge of the columns that they came from.

    Args:
        merge: A merge of entries.
        slots: int64 ``[R, H or 1, entries]``, the column of each entry.
        valid: bool, same shape; false for padding.
        columns: Number of columns seen so far, S.
    """
    heads = merge.into.shape[1]
    # Padding repeats a column, so it is written to an extra column, which is cut off.
    index = torch.where(valid, slots, columns).expand(-1, heads, -1)
    shape = (*index.shape[:2], columns + 1)
    into = torch.full(shape, -1, device=index.device).scatter_(-1, index, merge.into)[..., :columns]
    weights = torch.zeros(shape, dtype=merge.weights.dtype, device=index.device)
    weights = weights.scatter_(-1, index, merge.weights)[..., :columns]
    return Merge(into, weights, merge.renormalize_keys, merge.size_bias)
