"""What a reader sees: table, notes and figure."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from statistics_helpers import contrast
from test_speech_statistics import FOUND, speech

from kvprune.comparison.display import curves, plot
from kvprune.comparison.display.console import show_summary
from kvprune.comparison.display.notes import notes
from kvprune.comparison.display.table import groups, layout, table
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


def test_table_says_everything_within_126_columns(summary: Summary) -> None:
    lines = printed(summary, 126)  # wide enough for the difference to the partner, too
    assert max(map(len, lines)) <= 126
    headings = " ".join(lines[0].split())
    assert headings == (
        "policy budget kept % MiB/stock right % [95 %] - trim [95 %] read count = full % prefill token"
    )
    (row,) = (line for line in lines if line.startswith("random:reach=onward") and " 10 % " in line)
    cells = row.split()
    assert cells[:5] == ["random:reach=onward", "10", "%", "10.0", "0.000/0.001"]
    assert cells[5:8] == ["50.0", "[24,", "76]"]
    assert cells[8:11] == ["+0.0", "[-17,", "+17]"]
    assert cells[11:] == ["50.0", "50.0", "50.0", "x0.50", "x1.33"]


ALWAYS = ("policy", "budget", "kept %", "right %", "- trim")


@pytest.mark.parametrize("ranked", [False, True])
@pytest.mark.parametrize("width", [55, 60, 70, 80, 90, 100, 110])
def test_narrow_terminals_lose_what_matters_least(summary: Summary, width: int, ranked: bool) -> None:
    narrow = printed(summary, width, ranked=ranked)
    assert max(map(len, narrow)) <= width
    heading = " ".join(narrow[0].split())
    for name in ALWAYS:
        assert name in heading
    order = ["read", "prefill", "= full %", "MiB", "[95 %]"]
    there = [name in heading for name in order]
    assert there == sorted(there), "what comes first in the order goes first"
    missing = layout(summary, width, ranked=ranked).left_out
    words = {"read": "2 tasks", "[95 %]": "intervals", "MiB": "MiB" if ranked else "MiB/stock"}
    assert ("stock's MiB" in missing) == (not ranked)
    gone = {words.get(name, name) for name, is_there in zip(order, there, strict=True) if not is_there}
    assert gone <= set(missing)


def test_a_line_says_what_the_terminal_was_too_narrow_for(summary: Summary) -> None:
    assert layout(summary, 130).notes() == []
    (line,) = layout(summary, 80).notes()
    assert "2 tasks, prefill, token, = full %" in line
    assert "kvprune results export" in line
    console = Console(width=80, file=io.StringIO())
    show_summary(summary, Path("out"), console)
    assert isinstance(console.file, io.StringIO)
    assert line in " ".join(console.file.getvalue().split())
    assert "read" not in printed(dataclasses.replace(summary, tasks=("read",)))[0]


def test_names_are_shortened_if_that_saves_the_columns(summary: Summary) -> None:
    rows = [
        dataclasses.replace(row, label="cdpruner:theta=0.5,reach=onward,temperature=0.25")
        if row.label.startswith("random")
        else row
        for row in summary.rows
    ]
    long = dataclasses.replace(summary, rows=tuple(rows))
    fitting = layout(long, 126)
    assert (fitting.left_out, fitting.shortened) == ((), True)
    lines = printed(long, 126)
    assert max(map(len, lines)) <= 126
    assert any(line.startswith("cdpruner:theta=") and "\N{HORIZONTAL ELLIPSIS}" in line for line in lines)
    assert "the ends of names of policies" in fitting.notes()[0]


def test_names_that_would_be_alike_are_not_shortened(summary: Summary) -> None:
    rows = [
        dataclasses.replace(row, label=f"one:temperature=0.25,reach=onward,alpha={number % 2}")
        for number, row in enumerate(summary.rows)
    ]
    assert not layout(dataclasses.replace(summary, rows=tuple(rows)), 100).shortened


def test_ranked_tables_order_each_budget_by_accuracy(summary: Summary) -> None:
    better = dataclasses.replace(
        summary.rows[-1],
        spec="best:keep_ratio=0.1",
        label="best",
        accuracy=summary.rows[0].accuracy,
        versus_baseline=contrast(0.5, 0.125, 0.75, p_adjusted=0.01),
    )
    lines = printed(dataclasses.replace(summary, rows=(*summary.rows, better)), 124, ranked=True)
    assert " ".join(lines[0].split()).startswith("# policy budget kept % MiB right % [95 %] - trim [95 %]")
    rows = [line.split() for line in lines if " 10 % " in line]
    assert [row[:2] for row in rows] == [["1", "best"], ["2", "random:reach=onward"], ["2", "trim"]]
    assert "+50.0 [+12, +75]*" in " ".join(rows[0]), "the star says that it holds after Holm's correction"
    assert rows[2][9] == "0", "the baseline itself"
    assert "*" not in " ".join(rows[1])
    (full,) = (line for line in lines if line.split()[0] == "full")
    assert full.startswith("   full"), "what has no budget has no rank"
    assert max(map(len, lines)) <= 124


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
    assert "full: 1000.0 ms prefill, 48.39 ms per token, which is x1.11 and x2.00 the time without" in text
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
    plain = dataclasses.replace(summary, reread=False)
    text = "\n".join(notes(dataclasses.replace(plain, rows=(*summary.rows, late))))
    assert "Careful: norm:keep_ratio=0.5 prunes after prefill (reach=layer)" in text
    assert "Plain generate: the first token of an answer is computed before" in text
    alone = dataclasses.replace(plain, rows=(summary.rows[0], late))
    assert "Careful" not in "\n".join(notes(alone))
    fair = "\n".join(notes(dataclasses.replace(summary, rows=(*summary.rows, late))))
    assert "Careful" not in fair
    assert "The last token of each prompt was read again from the pruned cache" in "\n".join(notes(summary))


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
    styles = [curves.style(number) for number in range(28)]
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
    assert next(iter(curves.curves(many))) == "lossless", "the best first"


def test_speech_tables_say_what_matters(summary: Summary) -> None:
    heard = speech(FOUND)
    lines = printed(heard, 130, ranked=True)
    headings = " ".join(lines[0].split())
    assert headings == (
        "# policy budget kept s MiB WER % [95 %] CER % - trim [95 %] a b = full % loops capped"
    )
    first, second = (line for line in lines if " 50 % of 30.0 s " in line)
    assert first.split()[:2] == ["1", "trim"], "fewer errors are better"
    assert second.split()[:2] == ["2", "random:reach=onward"]
    text = "\n".join(notes(heard))
    for said in (
        "8 utterances",
        "lower is better",
        "bootstrap intervals over utterances",
        "negative is better",
    ):
        assert said in text
    assert "most frequent answer" not in text
    assert "Careful: 0 of 8 transcripts" not in text
    endless = "\n".join(notes(speech(FOUND, loops=True, finished=False)))
    assert "Careful: 8 of 8 transcripts of full were cut at their limit" in endless
    assert "Careful: 8 of 8 transcripts of full repeat themselves endlessly" in endless


@pytest.mark.parametrize("ranked", [False, True])
def test_narrow_speech_tables_lose_what_matters_least(ranked: bool) -> None:
    heard, seen = speech(FOUND), set()
    for width in range(52, 130, 3):
        narrow = printed(heard, width, ranked=ranked)
        assert max(map(len, narrow)) <= width
        heading = " ".join(narrow[0].split())
        for name in ("policy", "budget", "kept s", "WER %", "- trim"):
            assert name in heading
        whole = "\n".join(narrow)
        there = [
            name in whole
            for name in (" b ", "of 30.0 s", "= full %", "CER %", "MiB", "capped", "loops", "[95 %]")
        ]
        assert there == sorted(there), "what comes first in the order goes first"
        seen.add(tuple(there))
    assert len(seen) > 5


def test_what_was_reused_of_the_encoder_is_a_note(summary: Summary) -> None:
    assert "The encoder ran once." in notes(summary, encoder="The encoder ran once.")
    assert not any("encoder" in note for note in notes(summary))
