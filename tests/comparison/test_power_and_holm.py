"""Holm's correction, numbers of examples that are needed, partners, and what notes say of them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from comparison_helpers import answer, example
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statistics_helpers import contrast

from kvprune.comparison.display.difference_notes import plan_note
from kvprune.comparison.display.notes import notes
from kvprune.comparison.plan.grid import expand
from kvprune.comparison.statistics.multiple import holm
from kvprune.comparison.statistics.partner import partner_label, partners
from kvprune.comparison.statistics.permutation import mcnemar
from kvprune.comparison.statistics.power import examples_for_means, questions_needed, smallest_difference
from kvprune.comparison.statistics.summary import Summary, summarise

POLICIES = ["trim", "random:reach=onward", "uniform:reach=onward", "lossless"]


def summary_of(
    right: dict[str, Any],
    *,
    questions: int = 40,
    against: str = "trim",
    policies: list[str] | None = None,
) -> Summary:
    """Summarise `questions` answers; `right` says by spec (or by seed) how many of the first are right."""
    configurations = expand(policies or POLICIES, [0.5, 0.1])
    asked = [example(number) for number in range(questions)]
    answers = {}
    for one in configurations:
        found = right.get(one.spec, questions)
        for seed, count in (found if isinstance(found, dict) else {None: found}).items():
            for number, each in enumerate(asked):
                made = answer(one.spec, each, "7" if number < count else "8", kept=one.keep_ratio or 1.0)
                answers[one.spec, seed, each.id] = dataclasses.replace(made, seed=seed)
    return summarise(
        configurations, asked, answers, {}, batch_size=4, device="cpu", reread=True, against=against
    )


RIGHT = {
    "trim:keep_ratio=0.5": 30,
    "trim:keep_ratio=0.1": 20,
    "random:keep_ratio=0.5,reach=onward": 29,
    "random:keep_ratio=0.1,reach=onward": 5,
    "uniform:keep_ratio=0.5,reach=onward": 36,
    "uniform:keep_ratio=0.1,reach=onward": 14,
}


def test_holms_own_steps() -> None:
    # 0.01 * 4; 0.02 * 3; 0.03 * 2 is below 0.06 before it; 0.5 * 1.
    assert holm([0.02, 0.5, 0.01, 0.03]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_keeps_the_order_and_lies_between_the_raw_value_and_bonferronis(p_values: list[float]) -> None:
    found = holm(p_values)
    for raw, adjusted in zip(p_values, found, strict=True):
        assert raw <= adjusted <= min(1.0, raw * len(p_values)) + 1e-12
    assert [found[i] for i in np.argsort(p_values, kind="stable")] == sorted(found)
    assert holm(p_values[::-1]) == pytest.approx(found[::-1])


def test_both_families_are_corrected_for_the_whole_table() -> None:
    rows = {row.spec: row for row in summary_of(RIGHT).rows}
    against = [row.versus_baseline for row in rows.values() if row.versus_baseline]
    assert len(against) == 4
    raw = [mcnemar(1, 0), mcnemar(15, 0), mcnemar(0, 6), mcnemar(6, 0)]
    assert [one.p_value for one in against] == pytest.approx(raw)
    assert [one.p_adjusted for one in against] == pytest.approx(holm(raw))
    to_full = [row.versus_full for row in rows.values() if row.versus_full]
    assert len(to_full) == 7
    assert [one.p_adjusted for one in to_full] == pytest.approx(holm([one.p_value for one in to_full]))


def test_connors_numbers() -> None:
    # By hand: p = 0.2, d = 0.1: (1.95996 * 0.447214 + 0.841621 * sqrt(0.19)) / 0.1 = 12.4337; squared 154.6.
    assert questions_needed(0.1, 0.2) == 155
    assert questions_needed(-0.1, 0.2) == 155
    assert questions_needed(0.1, 0.0) == questions_needed(0.1, 0.1), "fewer cannot make that difference"
    assert examples_for_means(0.05, 0.2) == math.ceil((2.801585 * 4) ** 2)


@pytest.mark.parametrize(("difference", "discordant"), [(0.1, 0.2), (0.05, 0.1)])
def test_that_many_questions_have_the_promised_power(difference: float, discordant: float) -> None:
    """Chi-squared McNemar without correction, which Connor's formula is for, has 80 % power there."""
    count = questions_needed(difference, discordant)
    random = np.random.default_rng(0)
    gained, lost = (discordant + difference) / 2, (discordant - difference) / 2
    table = random.multinomial(count, [gained, lost, 1 - gained - lost], size=4000)
    z = (table[:, 0] - table[:, 1]) / np.sqrt(np.maximum(table[:, 0] + table[:, 1], 1))
    assert (np.abs(z) > stats.norm.ppf(0.975)).mean() == pytest.approx(0.8, abs=0.03)


@given(st.integers(10, 5000), st.sampled_from([0.05, 0.1, 0.2, 0.5]))
def test_the_smallest_difference_needs_what_there_is(questions: int, discordant: float) -> None:
    found = smallest_difference(questions, discordant)
    if found is None:
        assert questions_needed(discordant, discordant) > questions
    else:
        assert found <= discordant
        assert questions_needed(found, discordant) <= questions
        assert questions_needed(found * 0.99, discordant) >= questions


def test_rows_and_the_table_say_how_many_questions_they_need() -> None:
    summary = summary_of(RIGHT)
    one = summary.rows[3].versus_baseline
    assert one is not None
    assert one.disagreement == 1 / 40
    assert one.needed == {"2": questions_needed(0.02, 0.025), "5": 155, "10": 77}
    assert summary.disagreement == pytest.approx(6 / 40), "the median of 1, 6, 6 and 15 of 40"
    text = "\n".join(notes(summary))
    assert "exactly one of a row and its partner is right on 15 % of questions" in text
    assert f"needs about {', '.join(str(n) for n in summary.needed.values())} questions" in text
    assert "there are 40" in text


@pytest.mark.parametrize(
    ("against", "label"),
    [
        ("trim", "trim"),
        ("random", "random:reach=onward"),
        ("random:reach=onward", "random:reach=onward"),
        ("full", "full"),
        ("nobody", None),
    ],
)
def test_a_partner_is_a_label_or_a_name(against: str, label: str | None) -> None:
    assert partner_label(expand(POLICIES, [0.5, 0.1]), against) == label


def test_a_partner_without_a_budget_is_compared_with_at_all_of_them() -> None:
    configurations = expand([*POLICIES, "random:keep_tokens=3,reach=onward", "trim:k_ratio=0.2"], [0.5, 0.1])
    found = partners(configurations, "full")
    assert set(found.values()) == {"full"}
    assert len(found) == len(configurations) - 1
    own = partners(configurations, "trim")
    assert own["random:keep_ratio=0.1,reach=onward"] == "trim:keep_ratio=0.1"
    assert "random:keep_tokens=3,reach=onward" not in own
    summary = summary_of(RIGHT, against="full")
    for row in summary.rows[1:]:
        assert row.versus_baseline is not None
        assert row.versus_full is not None
        assert row.versus_baseline.value == row.versus_full.value
    text = "\n".join(notes(summary))
    assert "'- full' is the difference to full on the same questions" in text


def test_other_partners_have_other_differences() -> None:
    rows = {row.spec: row for row in summary_of(RIGHT, against="uniform").rows}
    one = rows["trim:keep_ratio=0.1"].versus_baseline
    assert one is not None
    assert (one.value, one.lost, one.gained) == (pytest.approx(6 / 40), 0, 6)
    assert rows["uniform:keep_ratio=0.1,reach=onward"].versus_baseline is None


def test_a_missing_partner_and_an_ambiguous_one_are_named(summary: Summary) -> None:
    text = "\n".join(notes(summary_of(RIGHT, against="nobody")))
    assert "No row of nobody is in the table" in text
    both = dataclasses.replace(
        summary, against="norm", partner="norm", partner_candidates=("norm", "norm:reach=onward")
    )
    assert "Careful: norm names 2 rows of each budget (norm, norm:reach=onward)" in "\n".join(notes(both))


def test_draws_are_named_and_single_ones_warned_of() -> None:
    spec = "random:keep_ratio=0.5,reach=onward"
    several = summary_of({**RIGHT, spec: {0: 28, 1: 29, 2: 30}})
    row = next(row for row in several.rows if row.spec == spec)
    assert (row.seeds, row.accuracy.value) == ((0, 1, 2), pytest.approx(87 / 120))
    assert row.versus_baseline is not None
    assert row.versus_baseline.value == pytest.approx(-1 / 40)
    assert (row.versus_baseline.lost, row.versus_baseline.pairs) == (3, 120)
    text = "\n".join(notes(several))
    assert "random:reach=onward drew 3 times (seeds 0, 1, 2)" in text
    assert "Careful: 3 draws say little" in text
    once = summary_of({**RIGHT, spec: {7: 28}})
    assert "Careful: random:reach=onward drew once (seed 7)" in "\n".join(notes(once))
    assert "drew" not in "\n".join(notes(summary_of(RIGHT)))


def test_two_that_draw_are_compared_draw_by_draw() -> None:
    one, two = "random:keep_ratio=0.5,reach=onward", "uniform:keep_ratio=0.5,reach=onward"
    alike = {seed: 20 + 3 * seed for seed in range(4)}
    rows = {row.spec: row for row in summary_of({**RIGHT, one: alike, two: alike}, against="uniform").rows}
    found = rows[one].versus_baseline
    assert found is not None
    assert (found.value, found.lost, found.gained, found.pairs) == (0.0, 0, 0, 160)
    assert found.p_value == 1.0
    assert found.low < 0 < found.high


def test_five_questions_cannot_show_anything_and_a_note_says_so() -> None:
    text = "\n".join(notes(summary_of({}, questions=5)))
    assert "with 5 questions no p-value can be below 0.062" in text


def test_reference_rows_belong_to_no_family_and_all_others_are_compared_with_them() -> None:
    best = {"answer-attention:keep_ratio=0.5": 38, "answer-attention:keep_ratio=0.1": 30}
    summary = summary_of({**RIGHT, **best}, policies=[*POLICIES, "answer-attention"])
    plain = {row.spec: row for row in summary_of(RIGHT).rows}
    for row in summary.rows:
        if row.is_reference:
            assert row.spec in best
            assert row.versus_answer_attention is None
            assert row.versus_baseline is not None
            assert row.versus_baseline.p_adjusted is None
            assert row.versus_full is not None
            assert row.versus_full.p_adjusted is None
            continue
        assert row.versus_baseline == plain[row.spec].versus_baseline, "the family is as large as without it"
        assert row.versus_full == plain[row.spec].versus_full
        if row.keep_ratio is not None:
            assert row.versus_answer_attention is not None
            other = best[f"answer-attention:keep_ratio={row.keep_ratio}"]
            assert row.versus_answer_attention.value == pytest.approx((RIGHT[row.spec] - other) / 40)
    assert summary.disagreement == summary_of(RIGHT).disagreement
    text = "\n".join(notes(summary, ranked=True))
    assert "answer-attention: looks at the full cache's answer before it prunes" in text


def test_before_a_run_a_sentence_says_what_it_can_show() -> None:
    text = plan_note(192)
    start = "questions, the smallest difference that can be shown is"
    assert text.startswith(f"With 192 {start} 4.5 points, 6.4 points, 9.0 points if")
    assert plan_note(50).startswith(f"With 50 {start} none, none, 17.3 points if"), "no more than there is"
    assert "5, 10, 20 % of them; a difference of 5 points needs about 155, 312, 626" in text
    summary = summary_of(RIGHT)
    known = plan_note(40, "pictures", summary)
    assert (
        f"needs about {summary.needed['2']}, {summary.needed['5']}, {summary.needed['10']} questions" in known
    )
    assert "80 % power" in plan_note(50, "speech")
    empty = dataclasses.replace(summary, disagreement=None, needed={})
    assert plan_note(192, "pictures", empty) == text


def test_the_help_for_tests_is_a_contrast() -> None:
    assert contrast(0.1, 0.0, 0.2).needed["10"] == questions_needed(0.1, 0.3)
