"""The paired difference of two accuracies, and where summaries have one."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
from comparison_helpers import answer, example
from hypothesis import given
from hypothesis import strategies as st

from kvprune.comparison.plan.grid import expand
from kvprune.comparison.statistics.paired import PairedDifference, paired_difference
from kvprune.comparison.statistics.summary import Summary, summarise


def table(both: int, own: int, other: int, neither: int) -> tuple[list[bool], list[bool]]:
    kinds = [(True, True)] * both + [(True, False)] * own + [(False, True)] * other
    kinds += [(False, False)] * neither
    return [one for one, _ in kinds], [two for _, two in kinds]


def ends(found: PairedDifference | None) -> tuple[float, float, float]:
    assert found is not None
    return found.value, found.low, found.high


def by_the_book(a: int, b: int, c: int, d: int) -> tuple[float, float, float]:
    """Newcombe's method 10, written out from the paper's formulas with Wilson's from scratch."""
    n, z = a + b + c + d, 1.959963984540054

    def wilson(hits: int) -> tuple[float, float, float]:
        p = hits / n
        middle, half = 2 * n * p + z * z, z * math.sqrt(z * z + 4 * n * p * (1 - p))
        return p, (middle - half) / (2 * (n + z * z)), (middle + half) / (2 * (n + z * z))

    (p1, l1, u1), (p2, l2, u2) = wilson(a + b), wilson(a + c)
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    cross = a * d - b * c
    cross = cross - n / 2 if cross > n / 2 else min(cross, 0)
    phi = cross / math.sqrt(margins) if margins else 0.0
    down = math.sqrt((p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2)
    up = math.sqrt((u1 - p1) ** 2 - 2 * phi * (u1 - p1) * (p2 - l2) + (p2 - l2) ** 2)
    return p1 - p2, p1 - p2 - down, p1 - p2 + up


@given(st.tuples(*[st.integers(0, 40)] * 4).filter(any))
def test_the_interval_is_newcombes(counts: tuple[int, int, int, int]) -> None:
    found = paired_difference(*table(*counts))
    value, low, high = by_the_book(*counts)
    assert found.value == pytest.approx(value, abs=1e-12)
    assert found.low == pytest.approx(max(-1, low), abs=1e-9)
    assert found.high == pytest.approx(min(1, high), abs=1e-9)


@given(st.tuples(*[st.integers(0, 40)] * 4).filter(any))
def test_swapping_sides_mirrors_it(counts: tuple[int, int, int, int]) -> None:
    own, other = table(*counts)
    one, two = paired_difference(own, other), paired_difference(other, own)
    assert (one.value, one.low, one.high) == pytest.approx((-two.value, -two.high, -two.low))
    assert -1 <= one.low <= one.value <= one.high <= 1


def test_answers_that_agree_still_leave_doubt() -> None:
    found = paired_difference([True] * 20, [True] * 20)
    assert found.value == 0
    assert found.low < -0.05
    assert found.high > 0.05


def test_pairing_narrows_the_interval() -> None:
    alike = paired_difference(*table(50, 10, 0, 40))
    apart = paired_difference(*table(30, 30, 20, 20))
    assert alike.value == apart.value == pytest.approx(0.1)
    assert alike.low > 0 > apart.low
    assert alike.high - alike.low < 0.6 * (apart.high - apart.low)


def test_it_covers_the_truth_as_often_as_it_says() -> None:
    draw, covered, rounds = random.Random(0), 0, 400
    for _ in range(rounds):
        kinds = draw.choices(range(4), weights=(60, 15, 5, 20), k=150)
        found = paired_difference(*table(*(kinds.count(kind) for kind in range(4))))
        covered += found.low <= 0.1 <= found.high
    assert 0.92 <= covered / rounds <= 0.98


@pytest.mark.parametrize(("own", "other"), [([], []), ([True], []), ([True], [True, False])])
def test_answers_must_be_pairs(own: list[bool], other: list[bool]) -> None:
    with pytest.raises(ValueError, match=r"total >= 1|zip"):
        paired_difference(own, other)


def test_rows_are_compared_with_trim_at_their_ratio(summary: Summary) -> None:
    found = {row.spec: row.versus_baseline for row in summary.rows}
    for spec in ("full", "lossless", "trim:keep_ratio=0.5", "trim:keep_ratio=0.1"):
        assert found[spec] is None
    assert all(row.versus_baseline for row in summary.rows if row.label == "random:reach=onward")


def test_the_difference_is_that_of_the_same_ratio_and_question() -> None:
    configurations = expand(["random:reach=onward", "trim", "trim:k_ratio=0.5"], [0.5, 0.1])
    asked = [example(number) for number in range(8)]
    right = {"trim:keep_ratio=0.5": 6, "random:keep_ratio=0.5,reach=onward": 4, "trim:keep_ratio=0.1": 1}
    answers = {
        (one.spec, None, e.id): answer(one.spec, e, "7" if number < right.get(one.spec, 2) else "8")
        for one in configurations
        for number, e in enumerate(asked)
    }
    done = summarise(
        configurations, asked, answers, {}, batch_size=4, device="cpu", reread=True, against="trim"
    )
    found = {row.spec: row.versus_baseline for row in done.rows}
    assert ends(found["random:keep_ratio=0.5,reach=onward"]) == ends(paired_difference(*table(4, 0, 2, 2)))
    assert ends(found["random:keep_ratio=0.1,reach=onward"]) == ends(paired_difference(*table(1, 1, 0, 6)))
    assert found["trim:k_ratio=0.5"] is None
    assert dataclasses.asdict(done)["rows"][1]["versus_baseline"]["value"] == -0.25
