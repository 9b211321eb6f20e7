"""Shares of right answers, with their intervals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Rate", "rate", "share"]


@dataclass(frozen=True, slots=True)
class Rate:
    """A share of examples with its 95 % Wilson interval, as fractions.

    Attributes:
        value: hits divided by total.
        low: lower end of the interval.
        high: upper end of the interval.
        hits: examples that count.
        total: all examples.
    """

    value: float
    low: float
    high: float
    hits: int
    total: int


def rate(hits: int, total: int) -> Rate:
    """Return the share of `hits` in `total` with its 95 % Wilson score interval.

    Raises:
        ValueError: If `total` is below 1, or `hits` is not in 0..`total`.
    """
    from scipy.stats import binomtest

    if not 0 <= hits <= total or total < 1:
        raise ValueError(f"a rate needs 0 <= hits <= total and total >= 1, got {hits} of {total}")
    interval = binomtest(hits, total).proportion_ci(confidence_level=0.95, method="wilson")
    return Rate(hits / total, float(interval.low), float(interval.high), hits, total)


def share(hits: Iterable[bool]) -> Rate:
    """Return the share of true values with its interval; see `rate`."""
    counted = list(hits)
    return rate(sum(counted), len(counted))
