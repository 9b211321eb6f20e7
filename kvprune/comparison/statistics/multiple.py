"""Holm's correction of many p-values."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["holm"]


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the adjusted p-values of one family of comparisons, in the given order.

    Holm, Scandinavian Journal of Statistics 6, 1979, 65-70: the i-th smallest of m p-values is multiplied by
    m - i + 1, and none may be smaller than one before it. If only those at most 0.05 are called
    differences, the chance that any of them is none is at most 5 %, however the comparisons depend on one
    another.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        least = max(least, min(1.0, p_values[place] * (len(p_values) - rank)))
        adjusted[place] = least
    return adjusted
