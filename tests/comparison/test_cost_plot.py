"""The figure of cost: who is on the Pareto front, panels, and error rates that would crush a linear axis."""

from __future__ import annotations

import dataclasses
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_speech_statistics import FOUND, RANDOM, speech

from kvprune.comparison.display import plot
from kvprune.comparison.display.cost_plot import pareto_front, render_cost
from kvprune.comparison.display.curves import curves, figure, metric_scale, references
from kvprune.comparison.display.figures import figures
from kvprune.comparison.statistics.rates import rate
from kvprune.comparison.statistics.summary import Row, Summary


def rows_of(summary: Summary, points: list[tuple[float, int]], label: str = "p") -> list[Row]:
    """Rows that hold so many bytes and have so many of ten right."""
    return [
        dataclasses.replace(
            summary.rows[-1],
            label=f"{label}{number}",
            spec=f"{label}{number}",
            bytes_held=held,
            accuracy=rate(hits, 10),
        )
        for number, (held, hits) in enumerate(points)
    ]


def held(row: Row) -> float:
    return row.bytes_held


def test_the_front_is_what_nobody_beats(summary: Summary) -> None:
    rows = rows_of(summary, [(4, 9), (1, 3), (2, 3), (2, 7), (3, 6), (4, 8), (8, 9)])
    assert [row.label for row in pareto_front(rows, held)] == ["p1", "p3", "p0"]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 10)), min_size=1, max_size=12))
def test_each_row_is_on_the_front_or_beaten_by_it(summary: Summary, points: list[tuple[int, int]]) -> None:
    rows = rows_of(summary, [(float(price), hits) for price, hits in points])
    front = pareto_front(rows, held)
    for row in rows:
        assert any(
            one.bytes_held <= row.bytes_held and one.accuracy.value >= row.accuracy.value for one in front
        )
    for one in front:
        assert not any(
            (row.bytes_held < one.bytes_held and row.accuracy.value >= one.accuracy.value)
            or (row.bytes_held <= one.bytes_held and row.accuracy.value > one.accuracy.value)
            for row in rows
        )


def test_rows_that_see_the_answer_and_rows_without_cost_take_no_part(summary: Summary) -> None:
    rows = rows_of(summary, [(1, 10), (2, 5), (3, 6)])
    rows[0] = dataclasses.replace(rows[0], label="answer-attention", is_reference=True)
    assert [row.label for row in pareto_front(rows, held)] == ["p1", "p2"]
    assert [row.label for row in pareto_front(rows, lambda row: None if row.label == "p1" else 1.0)] == ["p2"]
    seen = dataclasses.replace(summary, rows=(summary.rows[0], *rows))
    assert list(references(seen)) == ["answer-attention"]
    assert "answer-attention" not in curves(seen)


def test_for_errors_less_is_better() -> None:
    summary = speech(FOUND)
    assert pareto_front(summary.rows, lambda row: 1.0)[0].spec == "full"


def test_time_has_a_panel_if_it_was_measured(summary: Summary) -> None:
    both = Image.open(io.BytesIO(render_cost(summary)))
    rows = tuple(dataclasses.replace(row, speed=None) for row in summary.rows)
    one = Image.open(io.BytesIO(render_cost(dataclasses.replace(summary, rows=rows, stock=None))))
    assert (both.format, one.format) == ("PNG", "PNG")
    assert both.width > 1.4 * one.width


def test_all_figures_have_names_of_files(summary: Summary) -> None:
    assert set(figures(summary)) == {"accuracy_vs_kept.png", "cost_vs_accuracy.png"}
    assert all(picture.startswith(b"\x89PNG") for picture in figures(speech(FOUND)).values())


def test_an_endless_repetition_does_not_crush_the_others() -> None:
    endless = speech({**FOUND, RANDOM: (200, 4, 1, 2, 9, 0, 3, 300)})
    axis = figure((4, 3)).subplots()
    metric_scale(axis, endless)
    place = axis.transData.transform
    bottom, top = axis.get_ylim()
    height = place((0, top))[1] - place((0, bottom))[1]
    low, high = sorted(row.main.value for row in endless.rows)[:2]
    assert high < 0.1 < 5 < top
    assert place((0, high))[1] - place((0, low))[1] > 0.05 * height, "two low rates are told apart"
    assert plot.render(endless) != plot.render(speech(FOUND))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_figures_of_extreme_results_are_drawn(summary: Summary, value: float) -> None:
    rows = tuple(dataclasses.replace(row, accuracy=rate(round(10 * value), 10)) for row in summary.rows)
    assert render_cost(dataclasses.replace(summary, rows=rows)).startswith(b"\x89PNG")
    errors = {spec: (round(10 * value),) * 8 for spec in FOUND}
    assert all(figures(speech(errors)).values())
