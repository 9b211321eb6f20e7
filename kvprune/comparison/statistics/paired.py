"""The difference of two accuracies, given that both configurations answered the same questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvprune.comparison.statistics.rates import rate

__all__ = ["PairedDifference", "newcombe", "paired_difference"]


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """The difference of two rates with its 95 % interval, as fractions.

    Attributes:
        value: the own rate minus the other one.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    value: float
    low: float
    high: float


def paired_difference(own: Sequence[bool], other: Sequence[bool]) -> PairedDifference:
    """Return the difference of two accuracies with Newcombe's score interval for paired proportions.

    The two Wilson intervals are combined with the correlation of the answers (method 10 of Newcombe,
    Statistics in Medicine 17, 1998, 2635-2650). Unlike a bootstrap, it does not shrink to a point where all
    answers agree.

    Args:
        own: For each question, whether the own answer is right; at least one question.
        other: The same for the other configuration, in the same order.

    Raises:
        ValueError: If there are no answers, or the two sequences differ in length.
    """
    pairs = list(zip(own, other, strict=True))
    both, first, second, neither = (sum(pair == kind for pair in pairs) for kind in _KINDS)
    return newcombe(both, first, second, neither)


def newcombe(both: int, own: int, other: int, neither: int) -> PairedDifference:
    """Return the same as `paired_difference` from the four counts of the 2x2 table.

    Args:
        both: Questions that both answer rightly.
        own: Questions that only the own one answers rightly.
        other: Questions that only the other one answers rightly.
        neither: Questions that nobody answers rightly.

    Raises:
        ValueError: If all counts are 0.
    """
    total = both + own + other + neither
    first, second = rate(both + own, total), rate(both + other, total)
    phi = _correlation(both, own, other, neither)
    value = (own - other) / total
    down, up = first.value - first.low, first.high - first.value
    other_down, other_up = second.value - second.low, second.high - second.value
    return PairedDifference(
        value,
        max(-1.0, value - _combined(down, other_up, phi)),
        min(1.0, value + _combined(up, other_down, phi)),
    )


_KINDS = ((True, True), (True, False), (False, True), (False, False))
"""Whether the own and the other answer are right: the four cells of the 2x2 table."""


def _combined(one: float, other: float, phi: float) -> float:
    """Return the half-width of the interval on one side, from those of the two single intervals."""
    return math.sqrt(max(0.0, one**2 - 2 * phi * one * other + other**2))


def _correlation(both: int, own: int, other: int, neither: int) -> float:
    """Return phi of a 2x2 table, with a continuity correction if positive; 0 where phi is undefined."""
    sides = (both + own) * (other + neither) * (both + other) * (own + neither)
    if not sides:
        return 0.0
    product = float(both * neither - own * other)
    if product > 0:
        product = max(0.0, product - (both + own + other + neither) / 2)
    return product / math.sqrt(sides)
