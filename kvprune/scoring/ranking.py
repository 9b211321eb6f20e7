"""Ranks tokens by score within each stratum, and keeps the best ones that a budget allows.

A stratum is a set of columns that compete for one budget (see `kvprune.tokens.visibility.Visibility.strata`).
Equal scores are ordered by position, so results do not depend on the device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvprune.tokens.budget import Budget
from kvprune.tokens.visibility import Visibility

__all__ = [
    "each_stratum",
    "group_counts",
    "in_keeping_order",
    "keep_top",
    "limits",
    "members",
    "rank_within",
    "stratum_sizes",
]


def rank_within(scores: Tensor, strata: Tensor, first: Tensor | None = None) -> Tensor:
    """Return the rank of each column among the columns of its stratum, 0 for the highest score.

    Args:
        scores: ``[B, H, S]``, higher is better; equal scores are ordered by position.
        strata: int64 ``[B, S]``, the stratum of each column.
        first: bool ``[B, H, S]``, columns that rank before all other columns of their stratum.

    Returns:
        int64 ``[B, H, S]``. Columns of stratum -1 are ranked among themselves; ignore these ranks.

    Example:
        >>> scores = torch.tensor([[[0.1, 0.9, 0.5, 0.5]]])
        >>> rank_within(scores, torch.tensor([[0, 0, 0, 0]]))
        tensor([[[3, 0, 1, 2]]])
        >>> rank_within(scores, torch.tensor([[0, 0, 1, 1]]))
        tensor([[[1, 0, 0, 1]]])
    """
    # Stable sorts from the least to the most significant key: position, score, first, stratum.
    order = scores.argsort(dim=-1, descending=True, stable=True)  # [B, H, S], columns from best to worst
    if first is not None:
        order = order.gather(-1, (~first).to(torch.uint8).gather(-1, order).argsort(dim=-1, stable=True))
    by_head = strata[:, None].expand_as(scores)  # [B, H, S]
    if not bool((strata == strata[:, :1]).all()):
        order = order.gather(-1, by_head.gather(-1, order).argsort(dim=-1, stable=True))
    sorted_strata = by_head.gather(-1, order)
    start = torch.searchsorted(sorted_strata, sorted_strata)  # where the stratum of each column begins
    positions = torch.arange(scores.shape[-1], device=scores.device) - start
    return torch.empty_like(order).scatter_(-1, order, positions)


def stratum_sizes(strata: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return the size of each column's stratum, int64 ``[B, S]``; 0 for stratum -1.

    Args:
        strata: int64 ``[B, S]``.
        counted: bool ``[B, S]``, count only these columns.

    Example:
        >>> stratum_sizes(torch.tensor([[0, 0, 1, -1]]))
        tensor([[2, 2, 1, 0]])
    """
    sizes, present = _sizes(strata, counted)
    return torch.where(strata < 0, 0, sizes.gather(-1, present))


def _sizes(strata: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the size of each stratum ``[B, strata]``, and the index of each column into it."""
    counts = (strata >= 0) if counted is None else counted & (strata >= 0)
    present = strata.clamp(min=0)
    sizes = torch.zeros(strata.shape[0], int(present.max()) + 1, dtype=torch.int64, device=strata.device)
    return sizes.scatter_add_(-1, present, counts.to(torch.int64)), present


def members(strata: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the sample and the columns of each stratum of each sample, for methods that loop over them.

    Costs one host transfer, and one more for each stratum.

    Args:
        strata: int64 ``[B, S]``; columns of stratum -1 are left out.

    Yields:
        The number of the sample, and the columns of one of its strata, int64 ``[n]``.

    Example:
        >>> [(sample, columns.tolist()) for sample, columns in members(torch.tensor([[0, 1, 0, -1]]))]
        [(0, [0, 2]), (0, [1])]
    """
    for sample, highest in enumerate(strata.amax(-1).tolist()):
        for stratum in range(highest + 1):
            columns = (strata[sample] == stratum).nonzero().squeeze(1)
            if len(columns):
                yield sample, columns


def limits(budget: Budget, strata: Tensor) -> Tensor:
    """Return how many columns of each column's stratum a budget keeps, int64 ``[B, S]``.

    The number is exact: see `kvprune.Budget.resolve`. It is 0 for columns of stratum -1.

    Args:
        budget: The budget of each stratum.
        strata: int64 ``[B, S]``.

    Example:
        >>> limits(Budget(keep_ratio=0.5), torch.tensor([[0, 0, 0, 1, -1]]))
        tensor([[2, 2, 2, 1, 0]])
    """
    sizes, present = _sizes(strata)
    kept = torch.tensor([budget.resolve_all(row) for row in sizes.tolist()], device=strata.device)
    return torch.where(strata < 0, 0, kept.gather(-1, present))


def keep_top(scores: Tensor, strata: Tensor, limit: Tensor, visibility: Visibility) -> Tensor:
    """Keep the highest-scoring columns of each stratum, and at least one of each visibility group.

    The best column of each visibility group is kept first (KV03, KV05). The other columns follow by score
    until the stratum's limit is reached. If there are more groups than the limit, one column of each group is
    kept all the same. A sample without an eligible column keeps column 0 as a placeholder, which the cache
    manager evicts again.

    Args:
        scores: ``[B, H, S]``, higher is better.
        strata: int64 ``[B, S]``; columns of stratum -1 are never kept.
        limit: int64 ``[B, S]``, how many columns of the column's stratum are kept (see `limits`), or
            ``[B, H, S]`` if heads keep different numbers.
        visibility: Visibility of the same columns.

    Returns:
        bool ``[B, H, S]``, the kept columns.

    Example:
        >>> visibility = Visibility(
        ...     rows=torch.tensor([[[True]]]),
        ...     units=torch.tensor([[0, 0, 0, 0]]),
        ...     images=torch.tensor([0]),
        ...     live=torch.tensor([[True]]),
        ... )
        >>> limit = limits(Budget(keep_ratio=0.5), visibility.strata)
        >>> keep_top(torch.tensor([[[0.1, 0.9, 0.5, 0.7]]]), visibility.strata, limit, visibility)
        tensor([[[False,  True, False,  True]]])
    """
    eligible = (strata >= 0)[:, None]
    rank, first = _keeping_order(scores, strata, visibility)
    kept = (rank < (limit[:, None] if limit.ndim == 2 else limit)) & eligible
    if first is not None:
        kept |= first
    kept[..., 0] |= ~eligible.any(-1)
    return kept


def in_keeping_order(scores: Tensor, strata: Tensor, visibility: Visibility) -> Tensor:
    """Return the scores sorted in the order in which `keep_top` keeps columns, ``[B, H, S]``.

    Args:
        scores: ``[B, H, S]``, higher is better.
        strata: int64 ``[B, S]``, 0 for columns that may be kept and -1 for all others. The scores of the
            others are replaced by the lowest number of the dtype, at the end.
        visibility: Visibility of the same columns.
    """
    rank, _ = _keeping_order(scores, strata, visibility)
    others = (strata < 0)[:, None].expand_as(rank)  # [B, H, S]
    # Scores of the other columns are written to an extra place, which is cut off.
    width = scores.shape[-1]
    lowest = torch.finfo(scores.dtype).min
    ordered = scores.new_full((*scores.shape[:2], width + 1), lowest)
    return ordered.scatter_(-1, rank.masked_fill(others, width), scores)[..., :width]


def group_counts(strata: Tensor, visibility: Visibility) -> Tensor:
    """Return how many columns a sample must keep, one for each visibility group, int64 ``[B]``.

    Args:
        strata: int64 ``[B, S]``; columns of stratum -1 are not counted.
        visibility: Visibility of the same columns.

    Returns:
        At least 1 for a sample with columns that count, and 0 for a sample without one.
    """
    counted = strata >= 0
    groups = torch.where(counted, visibility.groups, -1)  # [B, S]
    # Group -1 is counted in place 0, which is cut off.
    present = groups.new_zeros(len(groups), len(visibility.images) + 1).scatter_(-1, groups + 1, 1)
    return present[:, 1:].sum(-1).clamp(min=counted.any(-1).to(torch.int64))


def _keeping_order(scores: Tensor, strata: Tensor, visibility: Visibility) -> tuple[Tensor, Tensor | None]:
    """Return the rank by which columns of a stratum are kept, and the best column of each group."""
    first = None
    if visibility.has_several_groups:
        groups = torch.where(strata >= 0, visibility.groups, -1)
        first = (rank_within(scores, groups) == 0) & (groups >= 0)[:, None]
    return rank_within(scores, strata, first), first


def each_stratum(strata: Tensor) -> Iterator[Tensor]:
    """Yield the mask of each stratum that occurs in the batch, bool ``[B, S]``, in increasing order.

    Costs one host transfer. Stratum 0, the columns that decoding sees, comes first; stratum -1 is left out.

    Example:
        >>> [mask.tolist() for mask in each_stratum(torch.tensor([[0, 1, -1]]))]
        [[[True, False, False]], [[False, True, False]]]
    """
    for number in strata.unique().tolist():
        if number >= 0:
            yield strata == number
