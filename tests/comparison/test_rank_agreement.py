"""How far two comparisons agree on a ranking: Kendall's tau-b, by budget and by mean rank."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprune.comparison.statistics.rank_agreement import kendall, rank_agreements, ranked_scores
from kvprune.comparison.statistics.summary import Summary
from kvprune.errors import ResultsError


def plain_tau(first: list[float], second: list[float]) -> float | None:
    """Tau-b pair by pair, as Kendall defines it."""
    same = tied_first = tied_second = pairs = 0
    for (a, b), (c, d) in itertools.combinations(zip(first, second, strict=True), 2):
        sign = (a > c) - (a < c), (b > d) - (b < d)
        same += sign[0] * sign[1]
        tied_first += not sign[0]
        tied_second += not sign[1]
        pairs += 1
    scale = (pairs - tied_first) * (pairs - tied_second)
    return same / math.sqrt(scale) if scale else None


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=12))
def test_tau_is_counted_pair_by_pair(pairs: list[tuple[int, int]]) -> None:
    first, second = ([float(pair[side]) for pair in pairs] for side in (0, 1))
    tau, p_value = kendall(first, second)
    wanted = plain_tau(first, second)
    assert (tau is None) == (wanted is None) == (p_value is None)
    assert tau is None or tau == pytest.approx(wanted)


def test_known_values() -> None:
    order = [1.0, 2.0, 3.0, 4.0, 5.0]
    tau, p_value = kendall(order, order)
    assert (tau, p_value) == pytest.approx((1, 2 / math.factorial(5)))
    tau, p_value = kendall(order, order[::-1])
    assert (tau, p_value) == pytest.approx((-1, 2 / math.factorial(5)))
    assert kendall([1.0, 1.0], [0.0, 1.0]) == (None, None)
    assert kendall([], []) == (None, None)


def test_numbers_that_differ_in_the_last_bits_are_ties() -> None:
    assert kendall([0.1 + 0.2, 0.3, 1.0], [1.0, 2.0, 3.0]) == kendall([0.3, 0.3, 1.0], [1.0, 2.0, 3.0])


def test_only_common_policies_are_ranked_at_each_budget() -> None:
    first = {0.5: {"a": 1.0, "b": 2.0, "c": 3.0}, 0.1: {"a": 3.0, "b": 2.0, "d": 1.0}, 0.05: {"a": 1.0}}
    second = {0.5: {"a": 1.0, "b": 2.0, "e": 0.0}, 0.1: {"a": 1.0, "b": 2.0, "d": 3.0}, 0.2: {"a": 1.0}}
    half, tenth, mean = rank_agreements(first, second)
    assert (half.keep_ratio, half.tau, half.policies) == (0.5, 1.0, ("a", "b"))
    assert (tenth.keep_ratio, tenth.tau, tenth.policies) == (0.1, -1.0, ("a", "b", "d"))
    assert (mean.keep_ratio, mean.policies) == (None, ("a", "b"))
    assert mean.tau is None, "a and b have equal mean ranks in the first"
    (only,) = rank_agreements(first, second, [0.1])
    assert only == tenth


def test_mean_ranks_and_not_mean_scores_are_compared() -> None:
    """One endless repetition of the policy that is best elsewhere does not make it the last."""
    first = {
        0.5: {"a": 0.1, "b": 0.2, "c": 0.3},
        0.2: {"a": 0.1, "b": 0.2, "c": 0.3},
        0.1: {"a": 99.0, "b": 1.0, "c": 2.0},
    }
    second = {ratio: {"a": 1.0, "b": 2.0, "c": 3.0} for ratio in first}
    mean = rank_agreements(first, second)[-1]
    assert mean.tau == pytest.approx(2 / math.sqrt(2 * 3)), "a and b share a mean rank of 5/3, c has 8/3"


def test_budgets_must_be_in_both() -> None:
    one, other = {0.5: {"a": 1.0}, 0.1: {"a": 1.0}}, {0.5: {"a": 1.0}}
    with pytest.raises(ResultsError, match=r"keep ratio 0.1 is not in both comparisons; in both are: 0.5"):
        rank_agreements(one, other, [0.1])
    with pytest.raises(ResultsError, match=r"no keep ratio is in both comparisons; in both are: none"):
        rank_agreements(one, {0.3: {"a": 1.0}})


def test_only_rows_that_can_be_compared_are_ranked(summary: Summary) -> None:
    assert set(ranked_scores(summary)) == {0.5, 0.1}
    assert set(ranked_scores(summary)[0.1]) == {"random:reach=onward", "trim"}
    rows = [
        dataclasses.replace(row, kept_fraction=row.kept_fraction + 0.04) if row.keep_ratio == 0.1 else row
        for row in summary.rows
    ]
    rows[-1] = dataclasses.replace(rows[-1], is_reference=True)
    found = ranked_scores(dataclasses.replace(summary, rows=tuple(rows)))
    assert 0.1 not in found
    assert len(found[0.5]) == 2
    assert found[0.5]["trim"] == -summary.rows[-2].accuracy.value
