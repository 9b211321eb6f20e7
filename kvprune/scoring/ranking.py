"""Pure tensor mathematics that policies share: attention mass, ranks within strata, keeping the top.

Nothing here knows a model or a cache. Ties are always broken by position, so results do not depend on the
device, and nothing ever holds a [B, H, T, S] tensor.
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
        strata: int64 ``[B, S]``, the set in which a column competes.
        first: bool ``[B, H, S]``, columns that rank before all others of their stratum.

    Returns:
        int64 ``[B, H, S]``. Columns of stratum -1 have ranks among themselves, which mean nothing.
    """
    # Stable sorts from the least to the most significant key: position, score, first, stratum.
    order = scores.argsort(dim=-1, descending=True, stable=True)
    if first is not None:
        order = order.gather(-1, (~first).to(torch.uint8).gather(-1, order).argsort(dim=-1, stable=True))
    by_head = strata[:, None].expand_as(scores)
    if not bool((strata == strata[:, :1]).all()):
        order = order.gather(-1, by_head.gather(-1, order).argsort(dim=-1, stable=True))
    sorted_strata = by_head.gather(-1, order)
    start = torch.searchsorted(sorted_strata, sorted_strata)
    positions = torch.arange(scores.shape[-1], device=scores.device) - start
    return torch.empty_like(order).scatter_(-1, order, positions)


def stratum_sizes(strata: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return how many columns the stratum of each column has, int64 ``[B, S]``; 0 for stratum -1.

    Args:
        strata: int64 ``[B, S]``.
        counted: bool ``[B, S]``, count only these columns.
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
    """Yield each sample's number and the columns of each of its strata, int64 ``[n]``, for greedy methods.

    Args:
        strata: int64 ``[B, S]``; columns of stratum -1 belong to none. Costs host transfers.
    """
    for sample, highest in enumerate(strata.amax(-1).tolist()):
        for stratum in range(highest + 1):
            columns = (strata[sample] == stratum).nonzero().squeeze(1)
            if len(columns):
                yield sample, columns


def limits(budget: Budget, strata: Tensor) -> Tensor:
    """Return how many columns of its stratum a budget keeps, for each column, int64 ``[B, S]``.

    Exact: each stratum's size goes through `Budget.resolve`. 0 for columns of stratum -1.
    """
    sizes, present = _sizes(strata)
    kept = torch.tensor([budget.resolve_all(row) for row in sizes.tolist()], device=strata.device)
    return torch.where(strata < 0, 0, kept.gather(-1, present))


def keep_top(scores: Tensor, strata: Tensor, limit: Tensor, visibility: Visibility) -> Tensor:
    """Keep the highest-scoring columns of each stratum, but starve no visibility group.

    The best column of each visibility group comes first (KV03, KV05); the others follow by score until the
    stratum's limit is reached. Where there are more groups than the limit allows, one of each stays. A
    sample without an eligible column keeps column 0 as a placeholder; the cache manager evicts it again.

    Args:
        scores: ``[B, H, S]``, higher is better.
        strata: int64 ``[B, S]``; columns of stratum -1 are never kept.
        limit: int64 ``[B, S]``, how many columns of the column's stratum are kept (see `limits`), or
            ``[B, H, S]`` where heads keep different numbers.
        visibility: Of the same columns.

    Returns:
        bool ``[B, H, S]``, the kept columns.
    """
    eligible = (strata >= 0)[:, None]
    rank, first = _keeping_order(scores, strata, visibility)
    kept = (rank < (limit[:, None] if limit.ndim == 2 else limit)) & eligible
    if first is not None:
        kept |= first
    kept[..., 0] |= ~eligible.any(-1)
    return kept


def in_keeping_order(scores: Tensor, strata: Tensor, visibility: Visibility) -> Tensor:
    """Return scores in the order in which `keep_top` keeps columns of one stratum, ``[B, H, S]``.

    Args:
        scores: ``[B, H, S]``.
        strata: int64 ``[B, S]``, 0 for columns that may be kept and -1 for others; these come last, as the
            lowest number.
        visibility: Of the same columns.
    """
    rank, _ = _keeping_order(scores, strata, visibility)
    others = (strata < 0)[:, None].expand_as(rank)
    # Ranks of other columns mean nothing: they are written to a place that is cut off.
    width = scores.shape[-1]
    lowest = torch.finfo(scores.dtype).min
    ordered = scores.new_full((*scores.shape[:2], width + 1), lowest)
    return ordered.scatter_(-1, rank.masked_fill(others, width), scores)[..., :width]


def group_counts(strata: Tensor, visibility: Visibility) -> Tensor:
    """Return how many columns a sample must keep, one for each visibility group, int64 ``[B]``.

    Args:
        strata: int64 ``[B, S]``; columns of stratum -1 are not counted.
        visibility: Of the same columns.

    Returns:
        At least 1 where a sample has columns that count, and 0 where it has none.
    """
    counted = strata >= 0
    groups = torch.where(counted, visibility.groups, -1)
    present = groups.new_zeros(len(groups), len(visibility.images) + 1).scatter_(-1, groups + 1, 1)
    return present[:, 1:].sum(-1).clamp(min=counted.any(-1).to(torch.int64))


def _keeping_order(scores: Tensor, strata: Tensor, visibility: Visibility) -> tuple[Tensor, Tensor | None]:
    """Return the rank by which columns of a stratum are kept, and which are the first of their groups."""
    first = None
    if visibility.has_several_groups:
        groups = torch.where(strata >= 0, visibility.groups, -1)
        first = (rank_within(scores, groups) == 0) & (groups >= 0)[:, None]
    return rank_within(scores, strata, first), first


def each_stratum(strata: Tensor) -> Iterator[Tensor]:
    """Yield for each stratum that some sample has which columns belong to it, bool ``[B, S]``.

    Costs one host transfer. In an interleaved chat, what decoding sees (stratum 0) comes first.
    """
    for number in strata.unique().tolist():
        if number >= 0:
            yield strata == number
