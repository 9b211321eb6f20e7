"""Shares of right answers, with their intervals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from kvprune.comparison.statistics.crossed import FEWEST, crossed

if TYPE_CHECKING:
    from kvprune.comparison.statistics.columns import Numbers

__all__ = ["Rate", "mean_rate", "rate", "share"]


@dataclass(frozen=True, slots=True)
class Rate:
    """A rate with its 95 % interval, as fractions.

    Attributes:
        value: hits divided by total.
        low: lower end of the interval.
        high: upper end of the interval.
        hits: right answers, or errors for an error rate.
        total: all answers, or words or characters of the references for an error rate.
    """

    value: float
    low: float
    high: float
    hits: float
    total: int


@lru_cache(maxsize=4096)
def rate(hits: int, total: int) -> Rate:
    """Return the share of `hits` in `total` with its 95 % Wilson score interval.

    Wilson, Journal of the American Statistical Association 22, 1927, 209-212. It keeps its level for few
    questions and for shares near 0 and 1, where the normal interval does not (Brown, Cai and DasGupta,
    Statistical Science 16, 2001, 101-133).

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


def mean_rate(hits: Numbers) -> Rate:
    """Return the share of hits over questions and draws.

    With one draw this is `rate`. With several, the interval counts that other questions and other draws would
    have given other answers; see `crossed`. Where fewer than `FEWEST` questions differ from the rest, a t
    interval is too narrow. The interval then also covers the Wilson interval of each draw.

    Args:
        hits: 1 for a hit and 0 for none, [draws, questions].
    """
    draws, questions = hits.shape
    singles = [rate(int(count), questions) for count in hits.sum(axis=1)]
    if draws == 1:
        return singles[0]
    found = crossed(hits)
    low, high = found.interval()
    odd = min(int((hits != rest).any(axis=0).sum()) for rest in (0, 1))
    if odd < FEWEST:
        low = min(low, *(one.low for one in singles))
        high = max(high, *(one.high for one in singles))
    return Rate(found.mean, max(0.0, low), min(1.0, high), int(hits.sum()), draws * questions)
