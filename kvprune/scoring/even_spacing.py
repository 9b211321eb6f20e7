"""Reserves part of a budget for evenly spaced tokens, so that a larger budget keeps a superset."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvprune.scoring.ranking import rank_within, stratum_sizes
from kvprune.tokens.visibility import Visibility

__all__ = ["even_order", "share_evenly"]


def share_evenly(
    importance: Tensor, visibility: Visibility, strata: Tensor, limit: Tensor, back: Tensor
) -> tuple[Tensor, Tensor]:
    """Return scores by which the most important tokens are kept, and some of the others evenly.

    Of ``limit`` columns of a stratum, ``back`` are spread evenly over what importance leaves out.

    Args:
        importance: ``[B, 1, S]``, finite; higher is better.
        visibility: Of the same columns.
        strata: int64 ``[B, S]``, the sets in which columns compete; -1 in none.
        limit: int64 ``[B, S]``, how many columns of its stratum are kept, for each column.
        back: int64 ``[B, S]``, how many of these are spread evenly.

    Returns:
        Scores ``[B, 1, S]`` for `keep_top`: importance in (0, 1) of its stratum, plus 1 for what is
        kept, plus 1 for the best of each visibility group. And which columns importance alone keeps, bool
        ``[B, S]``. If neither ``back`` nor ``limit - back`` falls when the budget rises, a larger budget
        keeps a superset.
    """
    ranks = rank_within(importance, strata)[:, 0]
    best = ranks < limit - back
    # A fixed order that is even at every length: what is given back at a small budget is at a larger one.
    # What importance keeps comes last in it.
    turn = torch.where(best, math.inf, even_order(strata).to(importance.dtype))
    given_back = rank_within(-turn[:, None], strata)[:, 0] < back
    groups = torch.where(strata >= 0, visibility.groups, -1)
    first = (rank_within(importance, groups)[:, 0] == 0) & (groups >= 0)
    position = 1 - (ranks + 1).to(importance.dtype) / (visibility.columns + 1)  # in (0, 1), by importance
    return (position + (best | given_back) + first)[:, None], best


def even_order(strata: Tensor) -> Tensor:
    """Return each column's turn in an order whose every beginning is spread evenly over its stratum.

    That is the position among the stratum's columns with its bits reversed (van der Corput's sequence).
    """
    zeros = torch.zeros_like(strata, dtype=torch.float32)
    position = rank_within(zeros[:, None], strata)[:, 0]
    size = stratum_sizes(strata)
    turn = torch.zeros_like(position)
    for bit in range(max(1, int(strata.shape[-1] - 1).bit_length())):
        # Reversed within as many bits as the stratum needs, so that padding of a batch changes nothing.
        needed = size > (1 << bit)
        turn = torch.where(needed, turn * 2 + (position >> bit & 1), turn)
    return turn
