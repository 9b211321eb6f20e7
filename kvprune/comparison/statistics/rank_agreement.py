"""How far two comparisons agree on which policy is better than which: Kendall's tau-b of their rankings."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from kvprune.comparison.data.packages import require
from kvprune.comparison.statistics.summary import Summary
from kvprune.errors import ResultsError

__all__ = ["RankAgreement", "Scores", "kendall", "rank_agreements", "ranked_scores"]

Scores = Mapping[float, Mapping[str, float]]
"""By keep ratio and label of a policy: a number that is lower for better policies."""

_DIGITS = 12
"""Scores that are equal to so many digits are ties: means over draws differ in the last bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankAgreement:
    """Kendall's tau-b of two rankings of the same policies.

    Attributes:
        keep_ratio: the budget; None for the ranking by mean rank over all budgets.
        tau: 1 for the same order, -1 for the reverse; None where it is not defined, because fewer than two
            policies are in both rankings, or all of them are equal in one.
        p_value: two-sided p-value of tau being 0; None where tau is.
        policies: labels of the policies that were ranked, sorted.
    """

    keep_ratio: float | None
    tau: float | None
    p_value: float | None
    policies: tuple[str, ...]


def ranked_scores(summary: Summary) -> dict[float, dict[str, float]]:
    """Return the scores of the rows that may be ranked: `Row.badness` by keep ratio and label.

    Left out are references, contrasts, rows without a keep ratio, and rows that kept another share than asked
    (`Row.misses_budget`): at one budget they are not comparable with the others.
    """
    found: dict[float, dict[str, float]] = {}
    for row in summary.rows:
        if row.competes and row.keep_ratio is not None and not row.misses_budget:
            found.setdefault(row.keep_ratio, {})[row.label] = row.badness
    return found


def rank_agreements(
    first: Scores, second: Scores, keep_ratios: Collection[float] | None = None
) -> tuple[RankAgreement, ...]:
    """Return how far two rankings agree at each budget, and by mean rank over the budgets.

    At each budget, the policies that both have are ranked. The mean rank is that of the policies that both
    have at all of these budgets, where equal policies share the mean of their places. Ranks and not scores
    are averaged, because one endless repetition outweighs everything else in a mean of error rates.

    Args:
        first: Scores of one comparison.
        second: Scores of another one; the data, the model and the metric may differ.
        keep_ratios: Budgets to look at; None takes all that both have.

    Returns:
        One for each budget, the largest first, and the one by mean rank last if there are several budgets.

    Raises:
        ResultsError: If both have no budget in common, or not all of `keep_ratios`.
        ModuleNotFoundError: If scipy is missing; the message says how to install it.
    """
    common = sorted(set(first) & set(second), reverse=True)
    have = ", ".join(f"{ratio:g}" for ratio in common) or "none"
    missing = [ratio for ratio in keep_ratios or () if ratio not in common]
    if missing or not common:
        what = f"keep ratio {missing[0]:g} is not" if missing else "no keep ratio is"
        raise ResultsError(f"{what} in both comparisons; in both are: {have}")
    ratios = [ratio for ratio in common if keep_ratios is None or ratio in keep_ratios]
    found = [
        _agreement(ratio, first[ratio], second[ratio], sorted(set(first[ratio]) & set(second[ratio])))
        for ratio in ratios
    ]
    if len(ratios) > 1:
        everywhere = sorted(set.intersection(*(set(one.policies) for one in found)))
        one, other = (_mean_ranks(scores, ratios, everywhere) for scores in (first, second))
        found.append(_agreement(None, one, other, everywhere))
    return tuple(found)


def kendall(first: Sequence[float], second: Sequence[float]) -> tuple[float | None, float | None]:
    """Return Kendall's tau-b and its two-sided p-value; None and None where tau is not defined.

    Kendall, Biometrika 33, 1945, 239-251: pairs in the same order minus pairs in the other order, divided by
    the geometric mean of the pairs that are not tied in the first and in the second. The p-value is exact
    where nothing is tied and there are few policies or few exchanges; else it is that of the normal
    approximation (`scipy.stats.kendalltau`).
    """
    require("scipy", who="Kendall's tau")
    from scipy.stats import kendalltau

    one, other = (tuple(round(value, _DIGITS) for value in values) for values in (first, second))
    if len(set(one)) < 2 or len(set(other)) < 2:
        return None, None
    found = kendalltau(one, other, variant="b")
    return float(found.statistic), float(found.pvalue)


def _agreement(
    keep_ratio: float | None, first: Mapping[str, float], second: Mapping[str, float], labels: Sequence[str]
) -> RankAgreement:
    tau, p_value = kendall([first[label] for label in labels], [second[label] for label in labels])
    return RankAgreement(keep_ratio=keep_ratio, tau=tau, p_value=p_value, policies=tuple(labels))


def _mean_ranks(scores: Scores, ratios: Sequence[float], labels: Sequence[str]) -> dict[str, float]:
    """Return the mean rank of each label over the budgets; 1 is the best, and ties share their mean place."""
    require("scipy", who="Kendall's tau")
    from scipy.stats import rankdata

    if not labels:
        return {}
    places = [
        rankdata([round(scores[ratio][label], _DIGITS) for label in labels]).tolist() for ratio in ratios
    ]
    return {label: statistics.mean(of) for label, *of in zip(labels, *places, strict=True)}
