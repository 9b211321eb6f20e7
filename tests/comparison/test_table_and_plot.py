"""What a reader sees: table, notes and figure."""

from __future__ import annotations

import dataclasses
import io

from PIL import Image
from rich.console import Console

from kvprune.comparison.display import plot
from kvprune.comparison.display.notes import notes
from kvprune.comparison.display.table import groups, table
from kvprune.comparison.statistics.paired import PairedDifference
from kvprune.comparison.statistics.summary import Summary


def printed(summary: Summary, width: int = 120, *, ranked: bool = False) -> list[str]:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    console.print(table(summary, width, ranked=ranked))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]


def test_rows_are_grouped_by_budget(summary: Summary) -> None:
    assert [[row.spec for row in group] for group in groups(summary.rows)] == [
        ["full", "lossless"],
        ["random:keep_ratio=0.5,reach=onward", "trim:keep_ratio=0.5"],
        ["random:keep_ratio=0.1,reach=onward", "trim:keep_ratio=0.1"],
    ]


def test_budgets_that_are_no_ratio_come_last_most_kept_first(summary: Summary) -> None:
    few = dataclasses.replace(summary.rows[-1], spec="few", keep_ratio=None, budget="keep_tokens=3")
    many = dataclasses.replace(few, spec="many", kept_fraction=0.9)
    assert [row.spec for row in groups([*summary.rows, few, many])[-1]] == ["many", "few"]


def test_table_says_everything_within_120_columns(summary: Summary) -> None:
    lines = printed(summary)
    assert max(map(len, lines)) <= 120
    headings = " ".join(lines[0].split())
    assert headings == "policy budget kept % MiB/stock right % [95 %] read count = full % prefill token"
    (row,) = (line for line in lines if line.startswith("random:reach=onward") and " 10 % " in line)
    cells = row.split()
    assert cells[:5] == ["random:reach=onward", "10", "%", "10.0", "0.000/0.001"]
    assert cells[5:] == ["50.0", "[24,", "76]", "50.0", "50.0", "50.0", "x0.50", "x1.33"]


def test_narrow_terminals_lose_task_columns_only(summary: Summary) -> None:
    narrow = printed(summary, 90)
    assert " ".join(narrow[0].split()) == (
        "policy budget kept % MiB/stock right % [95 %] = full % prefill token"
    )
    assert max(map(len, narrow)) <= 90
    assert "read" not in printed(dataclasses.replace(summary, tasks=("read",)))[0]


def test_ranked_tables_order_each_budget_by_accuracy(summary: Summary) -> None:
    better = dataclasses.replace(
        summary.rows[-1],
        spec="best:keep_ratio=0.1",
        label="best",
        accuracy=summary.rows[0].accuracy,
        versus_baseline=PairedDifference(0.5, 0.125, 0.75),
    )
    lines = printed(dataclasses.replace(summary, rows=(*summary.rows, better)), ranked=True)
    assert " ".join(lines[0].split()).startswith("# policy budget kept % MiB right % [95 %] - trim [95 %]")
    rows = [line.split() for line in lines if " 10 % " in line]
    assert [row[:2] for row in rows] == [["1", "best"], ["2", "random:reach=onward"], ["2", "trim"]]
    assert "+50.0 [+12, +75]" in " ".join(rows[0])
    assert rows[2][9] == "0", "the baseline itself"
    (full,) = (line for line in lines if line.split()[0] == "full")
    assert full.startswith("   full"), "what has no budget has no rank"
    assert max(map(len, lines)) <= 120


def test_ranked_tables_of_many_policies_fit(summary: Summary) -> None:
    rows = [
        dataclasses.replace(row, label=f"policy-name-{number}:reach=onward")
        for number in range(25)
        for row in summary.rows[2:]
    ]
    lines = printed(dataclasses.replace(summary, rows=(*summary.rows[:2], *rows)), ranked=True)
    assert max(map(len, lines)) <= 120
    assert len(lines) == 2 + 2 + len(rows), "no row needs two lines"


def test_other_budgets_are_readable(summary: Summary) -> None:
    tokens = dataclasses.replace(summary.rows[-1], keep_ratio=None, budget="keep_tokens=20")
    ratio = dataclasses.replace(summary.rows[-1], keep_ratio=None, budget="k_ratio=0.2")
    lines = printed(dataclasses.replace(summary, rows=(summary.rows[0], tokens, ratio)))
    assert any(line.startswith("trim") and " 20 tokens " in line for line in lines)
    assert any(line.startswith("trim") and " k_ratio=0.2 " in line for line in lines)


def test_notes_say_how_it_was_measured(summary: Summary) -> None:
    text = "\n".join(notes(summary))
    assert "10 examples (read 6, count 4)" in text
    assert "most frequent answer: read 100 %, count 100 %" in text
    assert "median of 3 repetitions" in text
    assert "full: 1000.0 ms prefill, 23.81 ms per token, which is x1.11 and x2.00 the time without" in text
    assert "Careful" not in text


def test_notes_warn_of_answers_that_were_cut(summary: Summary) -> None:
    rows = (
        dataclasses.replace(summary.rows[0], unfinished=2),
        dataclasses.replace(summary.rows[1], unfinished=7),
    )
    text = "\n".join(notes(dataclasses.replace(summary, rows=rows)))
    assert "Careful: 2 of 10 answers of full (7 of lossless) were cut at --max-new-tokens" in text


def test_notes_warn_of_policies_that_decide_at_different_points(summary: Summary) -> None:
    late = dataclasses.replace(summary.rows[2], spec="norm:keep_ratio=0.5", reach="layer")
    text = "\n".join(notes(dataclasses.replace(summary, rows=(*summary.rows, late))))
    assert "Careful: norm:keep_ratio=0.5 prunes after prefill (reach=layer)" in text
    alone = dataclasses.replace(summary, rows=(summary.rows[0], late))
    assert "Careful" not in "\n".join(notes(alone))
    fair = "\n".join(notes(dataclasses.replace(summary, rows=(*summary.rows, late), late_tokens=1)))
    assert "Careful" not in fair
    assert "The last token of each prompt was decoded after pruning (--late-tokens 1)" in fair


def test_notes_warn_of_budgets_that_changed_nothing(summary: Summary) -> None:
    idle = dataclasses.replace(summary.rows[-1], kept_fraction=1.0, bytes_held=1000.0)
    text = "\n".join(notes(dataclasses.replace(summary, rows=(*summary.rows[:-1], idle))))
    assert "Careful: trim:keep_ratio=0.1 kept 100.0 % of visible tokens instead of 10 %" in text


def test_untimed_summaries_say_so(summary: Summary) -> None:
    rows = tuple(dataclasses.replace(row, speed=None) for row in summary.rows)
    untimed = dataclasses.replace(summary, rows=rows, stock=None, repetitions=0)
    assert "Nothing was timed." in notes(untimed)
    assert "prefill" not in printed(untimed)[0]


def test_figure_has_a_panel_per_task_and_changes_with_the_numbers(summary: Summary) -> None:
    first = Image.open(io.BytesIO(plot.render(summary)))
    single = dataclasses.replace(summary, tasks=("read",))
    narrow = Image.open(io.BytesIO(plot.render(single)))
    assert first.format == "PNG"
    assert first.width > narrow.width > 600
    moved = tuple(dataclasses.replace(row, accuracy=summary.rows[0].accuracy) for row in summary.rows)
    second = Image.open(io.BytesIO(plot.render(dataclasses.replace(summary, rows=moved))))
    assert first.tobytes() != second.tobytes()


def test_figure_of_many_policies_tells_them_apart(summary: Summary) -> None:
    styles = [plot._style(number) for number in range(28)]
    assert len({(one["color"], str(one["linestyle"])) for one in styles}) == 28
    rows = [
        dataclasses.replace(row, label=f"p{number}", kept_fraction=row.kept_fraction)
        for number in range(25)
        for row in summary.rows[2:]
    ]
    many = dataclasses.replace(summary, rows=(*summary.rows[:2], *rows))
    few = Image.open(io.BytesIO(plot.render(summary)))
    picture = Image.open(io.BytesIO(plot.render(many)))
    assert picture.width > few.width, "the legend stands beside the panels"
    assert next(iter(plot._curves(many))) == "lossless", "the best first"
