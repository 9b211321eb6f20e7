"""How many examples a comparison needs before it can show a difference."""

from __future__ import annotations

import math

__all__ = ["POINTS", "examples_for_means", "questions_needed", "smallest_difference"]

POINTS = (2, 5, 10)
"""True differences, in points, for which the needed number of examples is given."""

_ALPHA, _POWER = 1.959963984540054, 0.8416212335729143
"""Normal quantiles of the two-sided 5 % level and of 80 % power."""


def questions_needed(difference: float, discordant: float) -> int:
    """Return how many questions McNemar's test needs for 80 % power at the two-sided 5 % level.

    Connor, Biometrics 43, 1987, 207-211: n = ((1.96 sqrt(p) + 0.84 sqrt(p - d ** 2)) / d) ** 2, where p is
    the share of questions that exactly one of the two answers rightly, and d the true difference.

    Args:
        difference: True difference of the two shares, 0..1, not 0.
        discordant: Share of questions that exactly one answers rightly; at least `difference` is taken,
            since fewer cannot make that difference.
    """
    d, p = abs(difference), max(discordant, abs(difference))
    return math.ceil(((_ALPHA * math.sqrt(p) + _POWER * math.sqrt(p - d * d)) / d) ** 2)


def examples_for_means(difference: float, deviation: float) -> int:
    """Return how many utterances the paired difference of means needs for the same power and level.

    n = ((1.96 + 0.84) s / d) ** 2, the formula of the paired z test (Lachin, Controlled Clinical Trials 2,
    1981, 93-113).

    Args:
        difference: True difference of the two error rates, not 0.
        deviation: Standard deviation of the difference of one utterance, in the same unit.
    """
    return max(2, math.ceil(((_ALPHA + _POWER) * deviation / difference) ** 2))


def smallest_difference(questions: int, discordant: float) -> float | None:
    """Return the smallest true difference that `questions` suffice for; see `questions_needed`.

    Returns:
        A fraction; None if the questions do not even suffice for a difference of `discordant`, the largest
        that there can be.
    """
    low, high = 0.0, discordant
    if questions_needed(high, discordant) > questions:
        return None
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if questions_needed(middle, discordant) <= questions else (middle, high)
    return high
