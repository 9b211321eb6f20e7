"""Reserves part of a budget for evenly spaced tokens. A larger budget keeps a superset."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvprune.scoring.ranking import rank_within, stratum_sizes
from kvprune.tokens.visibility import Visibility

__all__ = ["even_order", "share_evenly"]


def share_evenly(
    importance: Tensor,
    visibility: Visibility,
    strata: Tensor,
    limit: Tensor,
    back: Tensor,
    *,
    stride: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return scores for `keep_top` that keep the most important columns and some evenly spaced ones.

    Of the ``limit`` columns that a stratum keeps, ``limit - back`` are the most important ones. The other
    ``back`` are evenly spaced among the rest.

    Args:
        importance: ``[B, 1, S]``, finite; higher is better.
        visibility: Visibility of the same columns.
        strata: int64 ``[B, S]``, the stratum of each column; columns of stratum -1 are never kept.
        limit: int64 ``[B, S]``, how many columns of the column's stratum are kept.
        back: int64 ``[B, S]``, how many of these are evenly spaced.
        stride: How they are spaced. False: in the order of `even_order`. True: every n-th of the rest, from
            its first, where n is the size of the rest divided by ``back`` and rounded down.

    Returns:
        Scores ``[B, 1, S]``: the column's rank by importance, scaled to (0, 1), plus 1 if it is to be kept,
        plus 1 if it is the most important column of its visibility group. And the most important columns,
        bool ``[B, S]``. A larger budget keeps a superset if neither ``back`` nor ``limit - back`` decreases,
        unless ``stride`` is true.
    """
    ranks = rank_within(importance, strata)[:, 0]
    best = ranks < limit - back  # [B, S]
    given_back = _on_stride(strata, ~best, back) if stride else _first_in_order(strata, best, back)
    groups = torch.where(strata >= 0, visibility.groups, -1)
    first = (rank_within(importance, groups)[:, 0] == 0) & (groups >= 0)  # [B, S]
    position = 1 - (ranks + 1).to(importance.dtype) / (visibility.columns + 1)  # in (0, 1), by importance
    return (position + (best | given_back) + first)[:, None], best


def _first_in_order(strata: Tensor, best: Tensor, back: Tensor) -> Tensor:
    """Mark the first ``back`` columns of `even_order` that are not among the best, bool ``[B, S]``."""
    # This order does not depend on the budget, and each of its beginnings is evenly spaced. So a column that
    # a small budget gives back is also given back, or among the best, at a larger one. The best come last.
    turn = torch.where(best, math.inf, even_order(strata).to(torch.float32))
    return rank_within(-turn[:, None], strata)[:, 0] < back


def _on_stride(strata: Tensor, rest: Tensor, back: Tensor) -> Tensor:
    """Mark every n-th column of the rest of its stratum, ``back`` of them, bool ``[B, S]``."""
    cells = torch.where(rest, strata, -1)
    position = rank_within(torch.zeros_like(strata, dtype=torch.float32)[:, None], cells)[:, 0]
    step = (stratum_sizes(strata, rest) // back.clamp(min=1)).clamp(min=1)  # [B, S]
    return rest & (position % step == 0) & (position // step < back)


def even_order(strata: Tensor) -> Tensor:
    """Return each column's turn in an order of its stratum of which every beginning is evenly spaced.

    The turn is the column's position in its stratum with its bits reversed (the van der Corput sequence).
    Turns are distinct within a stratum. They are consecutive only if its size is a power of two.

    Args:
        strata: int64 ``[B, S]``.

    Returns:
        int64 ``[B, S]``.

    Example:
        >>> even_order(torch.tensor([[0, 0, 0, 0, 0, 0, 0, 0]]))
        tensor([[0, 4, 2, 6, 1, 5, 3, 7]])
    """
    zeros = torch.zeros_like(strata, dtype=torch.float32)
    position = rank_within(zeros[:, None], strata)[:, 0]
    size = stratum_sizes(strata)
    turn = torch.zeros_like(position)
    for bit in range(max(1, int(strata.shape[-1] - 1).bit_length())):
        # Only as many bits as the stratum's size needs, so that padding in a batch changes nothing.
        needed = size > (1 << bit)
        turn = torch.where(needed, turn * 2 + (position >> bit & 1), turn)
    return turn
