"""Questions and draws are both samples: variance, degrees of freedom, interval and coverage."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kvprune.comparison.statistics.crossed import crossed
from kvprune.comparison.statistics.rates import mean_rate, rate

tables = st.tuples(st.integers(2, 5), st.integers(2, 12)).flatmap(
    lambda shape: st.lists(
        st.lists(st.sampled_from([0.0, 1.0]), min_size=shape[1], max_size=shape[1]),
        min_size=shape[0],
        max_size=shape[0],
    ).map(np.array)
)


def test_a_table_worked_out_by_hand() -> None:
    # Draws (3, 1, 2) and (5, 3, 1): mean 2.5, questions 4, 2, 1.5, draws 2, 3.
    # Questions: 2 (1.5^2 + 0.5^2 + 1^2) / 2 = 3.5; draws: 3 (0.5^2 + 0.5^2) / 1 = 1.5.
    # Remainder: residuals -0.5, -0.5, 1 and their negatives: 3 / 2 = 1.5.
    found = crossed(np.array([[3.0, 1, 2], [5, 3, 1]]))
    assert found.mean == 2.5
    assert found.variance == pytest.approx((3.5 + 1.5 - 1.5) / 6)
    assert found.freedom == pytest.approx(3.5**2 / (3.5**2 / 2 + 1.5**2 / 1 + 1.5**2 / 2))
    half = stats.t.ppf(0.975, found.freedom) * math.sqrt(3.5 / 6)
    assert found.interval() == pytest.approx((2.5 - half, 2.5 + half))
    assert found.p_value() == pytest.approx(2 * stats.t.sf(2.5 / math.sqrt(3.5 / 6), found.freedom))


def test_draws_that_agree_are_as_one() -> None:
    values = np.array([0.0, 1, 1, 4, 7])
    found = crossed(np.stack([values] * 3))
    assert found.variance == pytest.approx(values.var(ddof=1) / 5)
    assert found.freedom == pytest.approx(4)
    low, high = stats.t.interval(0.95, 4, values.mean(), stats.sem(values))
    assert found.interval() == pytest.approx((low, high))


def test_questions_that_agree_leave_the_luck_of_draws() -> None:
    draws = np.array([0.0, 1, 5])
    found = crossed(np.stack([draws] * 4, axis=1))
    assert found.variance == pytest.approx(draws.var(ddof=1) / 3)
    assert found.freedom == pytest.approx(2)


def test_one_draw_has_no_luck_to_measure() -> None:
    with pytest.raises(ValueError, match="at least two of them, got 1"):
        crossed(np.ones((1, 4)))


@given(tables)
def test_order_does_not_matter_and_intervals_hold_the_value(values: Any) -> None:
    found, turned = crossed(values), crossed(values[::-1, ::-1])
    assert (found.mean, found.variance, found.freedom) == pytest.approx(
        (turned.mean, turned.variance, turned.freedom)
    )
    low, high = found.interval()
    assert low <= found.mean <= high
    assert crossed(-values).interval() == pytest.approx((-high, -low))
    assert 0 <= found.p_value() <= 1
    of_rate = mean_rate(values)
    assert 0 <= of_rate.low <= of_rate.value <= of_rate.high <= 1
    assert of_rate.value == pytest.approx(values.mean())
    assert (of_rate.hits, of_rate.total) == (int(values.sum()), values.size)


def test_one_draw_is_wilson() -> None:
    assert mean_rate(np.array([[1.0, 1, 0, 0, 0]])) == rate(2, 5)


def test_draws_that_are_all_right_still_leave_doubt() -> None:
    found = mean_rate(np.ones((4, 20)))
    assert (found.low, found.high) == (rate(20, 20).low, 1.0)
    almost = np.ones((4, 20))
    almost[0, 0] = 0
    assert mean_rate(almost).low <= rate(19, 20).low, "one question that differs is too few for a t interval"


def covered(questions: int, draws: int, luck: float, rounds: int = 2000) -> float:
    """Share of intervals that hold the truth; components: questions 1, draws `luck`, remainder 0.7."""
    random, hits = np.random.default_rng(7), 0
    for _ in range(rounds):
        values = random.standard_normal(questions)[None] + luck * random.standard_normal(draws)[:, None]
        low, high = crossed(values + 0.7 * random.standard_normal((draws, questions))).interval()
        hits += low <= 0 <= high
    return hits / rounds


@pytest.mark.slow
@pytest.mark.parametrize("questions", [30, 200])
@pytest.mark.parametrize("draws", [3, 5])
@pytest.mark.parametrize("luck", [0.0, 0.1, 0.2, 0.5])
def test_it_covers_the_truth_about_95_times_in_a_hundred(questions: int, draws: int, luck: float) -> None:
    assert 0.92 <= covered(questions, draws, luck) <= 0.98


@pytest.mark.slow
def test_two_draws_cover_little_luck_and_less_of_much() -> None:
    assert 0.93 <= covered(200, 2, 0.05) <= 0.98
    assert 0.87 <= covered(200, 2, 0.5) <= 0.92, "as the docstring says"


@pytest.mark.slow
@pytest.mark.parametrize(("draws", "luck"), [(3, 0.0), (3, 0.1), (5, 0.3)])
def test_shares_with_draws_cover_the_truth(draws: int, luck: float) -> None:
    random, hits, rounds, questions = np.random.default_rng(8), 0, 1500, 100
    truth = stats.norm.cdf(0.5 / math.sqrt(1 + luck**2 + 0.5**2))
    for _ in range(rounds):
        drawn = random.standard_normal(questions)[None] + luck * random.standard_normal(draws)[:, None]
        found = mean_rate((drawn + 0.5 * random.standard_normal((draws, questions)) > -0.5).astype(float))
        hits += found.low <= truth <= found.high
    assert 0.92 <= hits / rounds <= 0.98
