"""Rates, paired counts and paired ratios, against values worked out elsewhere."""

from __future__ import annotations

import math

import pytest
from comparison_helpers import answer, build_grid, example

from kvprune.comparison.plan.grid import Configuration, expand
from kvprune.comparison.statistics.rates import rate
from kvprune.comparison.statistics.speed import speeds
from kvprune.comparison.statistics.summary import Summary, summarise
from kvprune.comparison.storage.timings import TIMED_TOKENS, Lap, read_timings
from kvprune.errors import ResultsError


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    # Printed by Newcombe, Statistics in Medicine 17 (1998), and the mirror image of its 0 of 20.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_wilson_interval(hits: int, total: int, low: float, high: float) -> None:
    share = rate(hits, total)
    assert (share.value, share.hits, share.total) == (hits / total, hits, total)
    assert share.low == pytest.approx(low, abs=6e-5)
    assert share.high == pytest.approx(high, abs=6e-5)


@pytest.mark.parametrize("hits", range(8))
def test_wilson_interval_solves_its_equation(hits: int) -> None:
    share, z = rate(hits, 7), 1.959963984540054
    for end in (share.low, share.high):
        assert abs(share.value - end) == pytest.approx(z * math.sqrt(end * (1 - end) / 7), abs=1e-9)


@pytest.mark.parametrize(("hits", "total"), [(1, 0), (3, 2), (-1, 2)])
def test_impossible_rates_are_named(hits: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"got {hits} of {total}"):
        rate(hits, total)


def test_rows_count_what_they_say(summary: Summary) -> None:
    full, lossless, *pruned = summary.rows
    assert full.spec == "full"
    assert (full.accuracy.hits, full.agreement.hits, full.lost, full.gained) == (10, 10, 0, 0)
    assert (lossless.accuracy.value, lossless.p_value) == (1.0, 1.0)
    for row in pruned:
        assert row.keep_ratio is not None
        assert (row.accuracy.hits, row.agreement.hits, row.lost, row.gained) == (5, 5, 5, 0)
        assert row.p_value == pytest.approx(2 / 2**5), "all five flips went one way"
        assert {task: share.hits for task, share in row.tasks.items()} == {"read": 3, "count": 2}
        assert row.kept_fraction == pytest.approx(row.keep_ratio)
        assert row.bytes_held == pytest.approx(1000 * row.keep_ratio)
        assert row.bytes_full == 1000


def test_gains_are_not_losses(configurations: tuple[Configuration, ...]) -> None:
    asked = [example(number) for number in range(4)]
    answers = {}
    for one in configurations[:2]:
        for number, this in enumerate(asked):
            right = (one.spec == "full") == (number == 0)
            answers[one.spec, None, this.id] = answer(one.spec, this, "7" if right else "8", full="-")
    _, other = summarise(
        configurations[:2], asked, answers, {}, batch_size=4, device="cpu", reread=True, against="trim"
    ).rows
    assert (other.lost, other.gained, other.accuracy.hits) == (1, 3, 3)
    assert other.p_value == pytest.approx(0.625)
    assert other.speed is None


def test_constant_answer_counts_alternatives(configurations: tuple[Configuration, ...]) -> None:
    asked = [example(0, answers=("one", "1")), example(1, answers=("1",)), example(2, answers=("2", "ONE"))]
    answers = {("full", None, one.id): answer("full", one, "1") for one in asked}
    found = summarise(
        configurations[:1], asked, answers, {}, batch_size=1, device="cpu", reread=True, against="trim"
    )
    assert found.constant_answer == {"read": pytest.approx(2 / 3)}


def test_speed_is_the_median_of_paired_ratios() -> None:
    # A machine that slows down threefold must not change a ratio that is taken side by side.
    laps = {
        number: {
            None: Lap(1.0 * slow, 1.0 * slow + 31 * 0.1 * slow),
            "full": Lap(2.0 * slow, 2.0 * slow + 31 * 0.1 * slow),
            "trim": Lap(1.0 * slow, 1.0 * slow + 31 * 0.05 * slow),
        }
        for number, slow in enumerate((1.0, 2.0, 3.0))
    }
    found = speeds(laps)
    assert TIMED_TOKENS == 32
    assert found["trim"].prefill_ratio.median == pytest.approx(0.5)
    assert found["trim"].token_ratio is not None
    assert found["trim"].token_ratio.median == pytest.approx(0.5)
    assert found["trim"].token_ratio.low == pytest.approx(found["trim"].token_ratio.high)
    assert found["full"].prefill_ms == pytest.approx(4000)
    assert found["full"].token_ms == pytest.approx(200)
    assert found[None].prefill_ratio.median == pytest.approx(0.5)


def test_speed_admits_what_the_clock_cannot_tell() -> None:
    found = speeds({0: {None: Lap(1, 1), "full": Lap(1, 2), "trim": Lap(1, 0.9)}})
    assert found["trim"].token_ratio is None
    assert found["trim"].prefill_ratio.median == 1


@pytest.mark.parametrize(
    "row",
    [{}, {"repetition": 0, "stock": [1], "policies": {"full": [1, 2]}}, {"stock": [1, 2], "policies": {}}],
)
def test_damaged_laps_are_named(row: dict[str, object]) -> None:
    grid = build_grid(expand([], []), [example(0)])
    with pytest.raises(ResultsError, match=r"timings.jsonl, line 1 is damaged"):
        read_timings("timings.jsonl", [row], grid.addresses(), grid.digests)
