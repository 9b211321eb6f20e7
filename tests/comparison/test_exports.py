"""Exports, each read back by a reader of its own, with text of others that could do harm."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from statistics_helpers import contrast

from kvprune.comparison.display.exports import export
from kvprune.comparison.display.paper import latex_table, markdown_table
from kvprune.comparison.display.records import Provenance, Record, answer_records, row_records
from kvprune.comparison.display.table_formats import latex, markdown, to_csv, to_markdown, to_parquet
from kvprune.comparison.statistics.summary import Summary
from kvprune.comparison.storage.stored_run import read_run
from kvprune.errors import KVPruneError, PolicyOptionError, ResultsError
from kvprune.text import is_printable

MADE = Provenance(
    model="some/model_1",
    model_digest="commit:0",
    data="questions.jsonl",
    device="cpu",
    dtype="float32",
    machine="Linux-x86_64",
    versions="kvprune 0.1.0, torch 2.13.0",
    created="2026-01-02T03:04:05+00:00",
)

HOSTILE = (
    '=HYPERLINK("http://example.org","x")',
    "+1+1",
    "-2",
    "@SUM(A1)",
    "\t=1",
    'comma, "quotes" and\r\nlines',
    "\x1b]0;owned\x07",
    "\u202ereversed",
    "pipe | and `code` and <b>bold</b>",
    "\\input{/etc/passwd} $x_1^2$ 50 % & #1 ~ {}",
    "\\end{tabular}",
    "[link](http://example.org) ![x](y)",
    ":warning: @someone www.example.org",
    "字 Straße é",
    "\ud800 lone",
    "--- ''",
    "",
)


def hostile_records() -> list[Record]:
    return [
        {
            "id": text,
            "text": f"x {text}",
            "number": float(number),
            "count": number,
            "yes": number > 2,
            "no": None,
        }
        for number, text in enumerate(HOSTILE)
    ]


def test_csv_is_read_back_by_the_csv_module() -> None:
    records = hostile_records()
    text = to_csv(records)
    assert text.count("\r\n") == len(records) + 1, "no line break inside a cell"
    assert is_printable(text.replace("\r\n", ""))
    found = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [row["number"] for row in found] == [str(float(n)) for n in range(len(records))]
    assert [row["yes"] for row in found][:4] == ["false", "false", "false", "true"]
    assert {row["no"] for row in found} == {""}
    assert found[5]["id"] == 'comma, "quotes" and\\r\\nlines'
    assert found[13]["id"] == HOSTILE[13]
    for row in found:
        assert not row["id"].startswith(("=", "+", "-", "@", "\t", "\r")), "a spreadsheet would run it"
    assert found[0]["id"] == "'" + HOSTILE[0]


def test_numbers_keep_their_sign_and_all_digits_in_csv() -> None:
    found = list(csv.DictReader(io.StringIO(to_csv([{"x": -0.1 - 0.2, "n": -3}]), newline="")))
    assert (float(found[0]["x"]), found[0]["n"]) == (-0.1 - 0.2, "-3")


def test_parquet_is_read_back_by_pyarrow() -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    records = hostile_records()
    table = parquet.read_table(io.BytesIO(to_parquet(records, asdict(MADE))))
    found = table.to_pylist()
    for record, row in zip(records, found, strict=True):
        assert row["id"] == str(record["id"]).replace("\ud800", "\\ud800"), "the text itself"
        assert (row["number"], row["count"], row["yes"], row["no"]) == (
            record["number"],
            record["count"],
            record["yes"],
            None,
        )
    assert table.schema.metadata[b"model"] == b"some/model_1"
    assert str(table.schema.field("count").type) == "int64"


def test_parquet_without_pyarrow_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "kvprune\[export\]"'):
        to_parquet([{"x": 1}], {})


def cells(line: str) -> list[str]:
    """Split a line of a pipe table as CommonMark does: at pipes without a backslash."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def unescaped(text: str) -> str:
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", text)


def test_markdown_is_a_table_of_as_many_cells_and_the_same_text() -> None:
    lines = to_markdown(hostile_records()).splitlines()
    assert len(lines) == len(HOSTILE) + 2
    assert all(len(cells(line)) == 6 for line in lines)
    assert set(cells(lines[1])) == {"---", "---:"}
    assert all(is_printable(line) for line in lines)
    for text, line in zip(HOSTILE, lines[2:], strict=True):
        if text.isprintable() and not text.startswith("\\"):
            assert unescaped(cells(line)[0]) == text
    joined = "\n".join(lines)
    for live in (r"(?<!\\)<b>", r"(?<!\\)`", r"(?<!\\)\[", r"(?<!\\):warning:", r"(?<!\\)@", r"(?<!\\)://"):
        assert not re.search(live, joined), live


def test_times_and_names_of_policies_stay_readable_in_markdown() -> None:
    assert markdown("norm:reach=onward at 12:34:56") == "norm:reach=onward at 12:34:56"


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_latex_sets_text_as_it_is(text: str) -> None:
    found = latex(text)
    commands = set(re.findall(r"\\([A-Za-z]+|.)", found))
    allowed = {
        "textbackslash", "{", "}", "$", "&", "#", "%", "_", "textasciicircum", "textasciitilde", "textless",
        "textgreater", "textbar", "textquotedbl", "textasciigrave", "textquotesingle",
    }  # fmt: skip
    assert commands <= allowed, "no command of the text itself"
    assert balanced(found)
    assert not re.search(r"(?<!\\)[$&#%_^~]", found)
    assert "--" not in found, "no dash from two hyphens"
    assert "字" not in found


def balanced(text: str) -> bool:
    """Whether braces without a backslash are balanced."""
    depth = 0
    for sign in re.findall(r"\\.|[{}]", text):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        if depth < 0:
            return False
    return depth == 0


def body(table: str) -> list[list[str]]:
    """Check the frame of a LaTeX table; return the cells of its rows, without headings."""
    assert balanced(table)
    stack = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", table):
        if kind == "begin":
            stack.append(name)
        else:
            assert stack.pop() == name
    assert not stack
    order = [table.index(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")]
    assert order == sorted(order)
    (spec,) = re.findall(r"\\begin\{tabular\}\{([lr]+)\}", table)
    inner = table[table.index(r"\toprule") : table.index(r"\bottomrule")]
    rows = [
        re.split(r"(?<!\\)&", line.removesuffix(r"\\")) for line in inner.splitlines() if line.endswith(r"\\")
    ]
    assert {len(row) for row in rows} == {len(spec)}
    return [[cell.strip() for cell in row] for row in rows[1:]]


def test_the_latex_table_has_all_rows_and_the_best_of_each_budget_is_bold(summary: Summary) -> None:
    best = dataclasses.replace(
        summary.rows[-1],
        label="best_one",
        accuracy=summary.rows[0].accuracy,
        versus_baseline=contrast(0.5, 0.1, 0.8, p_value=0.0001, p_adjusted=0.0004),
    )
    seen = dataclasses.replace(best, label="answer-attention", is_reference=True)
    whole = dataclasses.replace(summary, rows=(*summary.rows, best, seen))
    text = latex_table(whole, MADE)
    rows = body(text)
    assert len(rows) == len(whole.rows)
    bold = [row[0] for row in rows if "textbf" in row[4]]
    assert bold == [r"\textbf{random:reach=onward}", r"\textbf{trim}", r"\textbf{best\_one}"]
    (own,) = (row for row in rows if "best" in row[0])
    assert own[5:] == [r"$+50.0^{*}$ {[}$+10.0$, $+80.0${]}", "$< 0.001$", "$< 0.001$"]
    (marked,) = (row for row in rows if "dagger" in row[0])
    assert marked[0] == r"answer-{}attention$^{\dagger}$"
    for said in (
        "$n = 10$ questions",
        "McNemar",
        r"some/model\_1",
        "torch 2.13.0",
        "2026-{}01-{}02T03:04:05",
    ):
        assert said in text
    assert "Linux-{}x86" in text


def test_hostile_names_do_not_break_the_tables(summary: Summary) -> None:
    for text in HOSTILE:
        rows = tuple(dataclasses.replace(row, label=text or "x") for row in summary.rows)
        odd = dataclasses.replace(summary, rows=rows, partner=text or "x")
        assert len(body(latex_table(odd, MADE))) == len(rows)
        table = [line for line in markdown_table(odd, MADE).splitlines() if line.startswith("|")]
        assert len({len(cells(line)) for line in table}) == 1
        assert len(table) == len(rows) + 2


def test_row_records_have_what_summary_json_has(summary: Summary) -> None:
    records = row_records(summary)
    assert len({tuple(record) for record in records}) == 1, "the same fields in each"
    row, record = summary.rows[-2], records[-2]
    assert record["spec"] == row.spec
    assert (record["accuracy"], record["accuracy_low"], record["right"], record["answers"]) == (
        row.accuracy.value,
        row.accuracy.low,
        row.accuracy.hits,
        10,
    )
    assert record["accuracy[read]"] == row.tasks["read"].value
    assert row.versus_full is not None
    assert record["versus_full_p_adjusted"] == row.versus_full.p_adjusted
    assert record["versus_full_needed_5"] == row.versus_full.needed["5"]
    assert record["versus_answer_attention_value"] is None
    assert record["token_ratio"] == pytest.approx(4 / 3)


def test_a_folder_is_exported_in_each_format(folder: Path) -> None:
    stored = read_run(folder)
    written: Any = json.loads((folder / "summary.json").read_text("utf-8"))
    rows = list(csv.DictReader(io.StringIO(export(stored, "csv").decode(), newline="")))
    assert [row["spec"] for row in rows] == [row["spec"] for row in written["rows"]]
    assert [float(row["accuracy"]) for row in rows] == [row["accuracy"]["value"] for row in written["rows"]]
    assert len(body(export(stored, "latex").decode())) == len(rows)
    lines = [line for line in export(stored, "markdown").decode().splitlines() if line.startswith("|")]
    assert len(lines) == len(rows) + 2
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(io.BytesIO(export(stored, "parquet")))
    assert table.column("spec").to_pylist() == [row["spec"] for row in rows]
    answers = list(csv.DictReader(io.StringIO(export(stored, "csv", answers=True).decode(), newline="")))
    assert len(answers) == len(stored.answers)
    assert answers[0]["receipt"] == answer_records(stored.answers.values())[0]["receipt"]


def test_what_cannot_be_exported_is_named(folder: Path) -> None:
    stored = read_run(folder)
    with pytest.raises(KVPruneError, match=r"unknown format .cvs.; choose from csv.*did you mean .csv."):
        export(stored, "cvs")
    with pytest.raises(KVPruneError, match="answers make no table for a paper"):
        export(stored, "latex", answers=True)
    with pytest.raises(PolicyOptionError, match="there is no 'trin' to compare with; did you mean 'trim'"):
        export(stored, "csv", against="trin")
    half = dataclasses.replace(stored, answers=dict(list(stored.answers.items())[:5]))
    with pytest.raises(ResultsError, match=r"is unfinished: \d+ answers are missing"):
        export(half, "csv")
    assert export(half, "csv", answers=True).count(b"\r\n") == 6
    with pytest.raises(ResultsError, match="holds no answers yet"):
        export(dataclasses.replace(stored, answers={}), "csv", answers=True)
