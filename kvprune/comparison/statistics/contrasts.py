"""The difference of a configuration to a partner that answered the same examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvprune.comparison.statistics.columns import Columns
from kvprune.comparison.statistics.crossed import FEWEST, crossed
from kvprune.comparison.statistics.error_rates import Resampled, deviation
from kvprune.comparison.statistics.paired import PairedDifference, newcombe
from kvprune.comparison.statistics.permutation import fewest_p, mcnemar, sign_flip
from kvprune.comparison.statistics.power import POINTS, examples_for_means, questions_needed

if TYPE_CHECKING:
    from kvprune.comparison.statistics.columns import Numbers

__all__ = ["Contrast", "accuracy_contrast", "error_contrast", "same_draws"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast(PairedDifference):
    """The rate of a row minus that of its partner, with everything that says how sure that is.

    Attributes:
        value: the difference.
        low: lower end of its 95 % interval.
        high: upper end of its 95 % interval.
        lost: answers that are worse than the partner's to the same example: wrong where that is right; for
            speech, with more wrong words.
        gained: answers that are better.
        pairs: all pairs of answers: examples times draws.
        p_value: p-value of a difference; see `accuracy_contrast` and `error_contrast`.
        p_adjusted: the same after Holm's correction for all rows of the table; None where the row is a
            reference and belongs to no family of comparisons.
        disagreement: share of questions that exactly one of both answers rightly; for speech, the standard
            deviation of one utterance's difference.
        needed: examples for 80 % power if the true difference is as many points as the key says.
    """

    lost: int
    gained: int
    pairs: int
    p_value: float
    p_adjusted: float | None = None
    disagreement: float
    needed: Mapping[str, int]


def same_draws(own: Columns, other: Columns) -> tuple[list[int], list[int]]:
    """Return which draws of two configurations are compared: those of the same seed.

    One that drew nothing answers every draw of the other alike. Two that drew from different seeds are paired
    in the order of their seeds.

    Returns:
        The number of the own draw of each pair, and that of the other's.
    """
    if len(own.seeds) == 1 or len(other.seeds) == 1:
        pairs = [(i, j) for i in range(len(own.seeds)) for j in range(len(other.seeds))]
    else:
        pairs = [(i, other.seeds.index(s)) for i, s in enumerate(own.seeds) if s in other.seeds]
        pairs = pairs or [(i, i) for i in range(min(len(own.seeds), len(other.seeds)))]
    return [i for i, _ in pairs], [j for _, j in pairs]


def accuracy_contrast(own: Columns, other: Columns) -> Contrast:
    """Compare two shares of right answers.

    One draw: Newcombe's interval (`paired_difference`) and the exact McNemar test. Several: the t
    interval and t test of `crossed`, of the differences by question and draw (`same_draws`), so that the luck
    of both draws counts. Where fewer than `FEWEST` questions differ, the interval also covers Newcombe's for
    each draw, and the p-value is not below that of McNemar's test for each draw. It is never below
    `fewest_p`.
    """
    mine, theirs = same_draws(own, other)
    first, second = own.correct[mine], other.correct[theirs]  # [draws, questions]
    differences = first - second
    singles = [_single(one, two) for one, two in zip(first, second, strict=True)]
    found, p_value = singles[0]
    if len(singles) > 1:
        mean = crossed(differences)
        differ = int(differences.any(axis=0).sum())
        (low, high), p_value = mean.interval(), max(mean.p_value(), fewest_p(differ))
        if differ < FEWEST:
            low = min(low, *(one.low for one, _ in singles))
            high = max(high, *(one.high for one, _ in singles))
            p_value = max(p_value, *(p for _, p in singles))
        found = PairedDifference(mean.mean, max(-1.0, low), min(1.0, high))
    discordant = float((differences != 0).mean())
    return Contrast(
        value=found.value,
        low=found.low,
        high=found.high,
        lost=int((differences < 0).sum()),
        gained=int((differences > 0).sum()),
        pairs=differences.size,
        p_value=p_value,
        disagreement=discordant,
        needed={str(points): questions_needed(points / 100, discordant) for points in POINTS},
    )


def error_contrast(own: Columns, other: Columns, rates: Resampled, partner: Resampled) -> Contrast:
    """Compare two word error rates.

    The interval is the paired bootstrap of `Resampled.minus`. One draw: the exact test of `sign_flip`, on the
    difference of the errors of each utterance. Several: the t test of `crossed` on these differences, by
    utterance and draw, so that the luck of both draws counts. Where fewer than `FEWEST` utterances differ,
    its p-value is not below that of `sign_flip` for each draw. It is never below `fewest_p`.

    Args:
        own: Transcripts of the row.
        other: Transcripts of the partner.
        rates: Resampled word errors of the row.
        partner: Resampled word errors of the partner.
    """
    mine, theirs = same_draws(own, other)
    found = rates.minus(partner, mine, theirs)
    errors: Numbers = rates.errors[mine] - partner.errors[theirs]  # [draws, utterances]
    if len(mine) == 1:
        p_value = sign_flip(errors[0])
    else:
        differ = int(errors.any(axis=0).sum())
        p_value = max(crossed(errors).p_value(), fewest_p(differ))
        if differ < FEWEST:
            p_value = max(p_value, *(sign_flip(one) for one in errors))
    spread = deviation(errors, rates.units)
    return Contrast(
        value=found.value,
        low=found.low,
        high=found.high,
        lost=int((errors > 0).sum()),
        gained=int((errors < 0).sum()),
        pairs=errors.size,
        p_value=p_value,
        disagreement=spread,
        needed={str(points): examples_for_means(points / 100, spread) for points in POINTS},
    )


def _single(own: Numbers, other: Numbers) -> tuple[PairedDifference, float]:
    """Return Newcombe's interval and McNemar's p-value of one draw; both arrays are [questions]."""
    total, right = own.size, int(own.sum())
    both = int((own * other).sum())
    first, second = right - both, int(other.sum()) - both
    return newcombe(both, first, second, total - both - first - second), mcnemar(second, first)
