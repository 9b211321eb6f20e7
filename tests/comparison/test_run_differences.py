"""How two results folders differ: paired by example, receipts, ingredients."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from comparison_helpers import SMALL_SPECS
from statistics_helpers import transcript, utterance

from kvprune.comparison.statistics.paired import newcombe
from kvprune.comparison.statistics.run_differences import compare_runs
from kvprune.comparison.statistics.stored_summary import summary_of
from kvprune.comparison.storage.stored_run import StoredRun, read_run
from kvprune.errors import ResultsError

TRIM = "trim:keep_ratio=0.25"


@pytest.fixture
def stored(folder: Path) -> StoredRun:
    return read_run(folder)


def changed(stored: StoredRun, **changes: Any) -> StoredRun:
    """Return the run with every answer of trim changed."""
    answers = {
        key: dataclasses.replace(one, **changes) if key[0] == TRIM else one
        for key, one in stored.answers.items()
    }
    return dataclasses.replace(stored, answers=answers)


def test_a_folder_does_not_differ_from_itself(stored: StoredRun) -> None:
    found = compare_runs(stored, stored)
    assert {row.spec for row in found.rows} == set(SMALL_SPECS)
    assert (found.changed, found.only_first, found.only_second, found.unpaired) == ((), (), (), ())
    for row in found.rows:
        assert (row.difference.value, row.difference.p_value) == (0.0, 1.0)
        assert (row.examples, row.same_answers, row.same_receipts) == (4, row.answers, row.answers)
        assert row.first == row.second


def test_the_values_are_those_of_the_summary(stored: StoredRun) -> None:
    rates = {row.spec: row.accuracy for row in summary_of(stored).rows}
    assert {row.spec: row.first for row in compare_runs(stored, stored).rows} == rates


def test_the_difference_is_the_second_minus_the_first(stored: StoredRun) -> None:
    wrong, right = changed(stored, correct=False, answer="?"), changed(stored, correct=True)
    (row,) = (row for row in compare_runs(wrong, right).rows if row.spec == TRIM)
    own = newcombe(0, 4, 0, 0)
    assert (row.difference.value, row.difference.low, row.difference.high) == (own.value, own.low, own.high)
    assert (row.first.value, row.second.value, row.same_answers, row.same_receipts) == (0.0, 1.0, 0, 4)
    (back,) = (row for row in compare_runs(right, wrong).rows if row.spec == TRIM)
    assert back.difference.value == -1.0
    (other,) = (
        row for row in compare_runs(stored, changed(stored, receipt="1" * 64)).rows if row.spec == TRIM
    )
    assert (other.same_answers, other.same_receipts) == (4, 0)


def test_only_common_examples_and_configurations_are_paired(stored: StoredRun) -> None:
    first, *rest = stored.examples
    odd = dataclasses.replace(first, answers=("another",))
    found = compare_runs(stored, dataclasses.replace(stored, examples=(odd, *rest)))
    assert {row.examples for row in found.rows} == {3}
    assert len(found.changed) == 1
    assert found.changed[0].startswith(f"examples.{first.id} was")
    few = dataclasses.replace(stored, configurations=stored.configurations[:2])
    assert compare_runs(stored, few).only_first == tuple(c.spec for c in stored.configurations[2:])
    assert compare_runs(few, stored).only_second == tuple(c.spec for c in stored.configurations[2:])


def test_unfinished_folders_are_compared_as_far_as_they_are(stored: StoredRun) -> None:
    gone = stored.examples[0].id
    half = {key: one for key, one in stored.answers.items() if key[0] != TRIM or key[2] == gone}
    (row,) = (
        row
        for row in compare_runs(dataclasses.replace(stored, answers=half), stored).rows
        if row.spec == TRIM
    )
    assert row.examples == 1
    none = {key: one for key, one in half.items() if key[0] != TRIM}
    found = compare_runs(dataclasses.replace(stored, answers=none), stored)
    assert found.unpaired == (TRIM,)
    with pytest.raises(ResultsError, match="is unfinished: 3 answers are missing"):
        summary_of(dataclasses.replace(stored, answers=half))


def test_changed_ingredients_are_named(stored: StoredRun) -> None:
    grid = dataclasses.replace(stored.grid, context={**stored.grid.context, "max_new_tokens": 9})
    found = compare_runs(stored, dataclasses.replace(stored, grid=grid))
    assert found.changed == ("max_new_tokens was 3 and is now 9",)


def test_speech_is_paired_by_errors_and_not_with_pictures(stored: StoredRun) -> None:
    asked = tuple(utterance(number) for number in range(6))
    context = {**stored.grid.context, "kind": "speech"}

    def heard(errors: int) -> StoredRun:
        answers = [
            transcript(one.spec, each, errors * (number % 2), 10)
            for one in stored.configurations
            for number, each in enumerate(asked)
        ]
        return dataclasses.replace(
            stored,
            examples=asked,
            answers={one.key: one for one in answers},
            grid=dataclasses.replace(stored.grid, context=context),
        )

    row = compare_runs(heard(2), heard(4)).rows[0]
    assert (row.first.value, row.second.value) == pytest.approx((0.1, 0.2))
    assert row.difference.value == pytest.approx(0.1)
    assert row.difference.p_value == 2 / 2**3
    assert row.difference.low <= 0.1 <= row.difference.high
    with pytest.raises(ResultsError, match=r"is about pictures and .* about speech"):
        compare_runs(stored, heard(1))
