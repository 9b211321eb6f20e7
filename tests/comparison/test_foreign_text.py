"""Text of others is shown as it is: names of tasks, specs and paths are no markup, no formula, no escape."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from comparison_helpers import example
from rich.console import Console

from kvprune.comparison.display import plot
from kvprune.comparison.display.console import show_summary
from kvprune.comparison.execution.questions import PictureGenerator
from kvprune.comparison.statistics.summary import Summary
from kvprune.comparison.verification.consistency import Difference
from kvprune.comparison.verification.verification import Verification
from kvprune.errors import DataError, KVPruneError
from kvprune.text import is_printable, printable_json

HOSTILE = (
    "[/nope]",
    "[bold red]x[/bold red]",
    "[link=http://example.org]x[/link]",
    ":warning:",
    "$\\frac{$",
    "$x$ and $",
    "\x1b]0;owned\x07",
    "\x1b[2J\x9b2J",
    "\u202ereversed",
    "two\nlines\r\t",
    "\N{ZERO WIDTH SPACE}",
    "_hidden",
    "字" * 50,
    "x" * 10_000,
    " ",
    "{task}",
    "%s",
)


def named(summary: Summary, task: str) -> Summary:
    """Return a summary whose first task has another name."""
    old = summary.tasks[0]

    def renamed(values: Any) -> dict[str, Any]:
        return {task if name == old else name: value for name, value in values.items()}

    rows = [dataclasses.replace(row, tasks=renamed(row.tasks)) for row in summary.rows]
    return dataclasses.replace(
        summary,
        tasks=(task, *summary.tasks[1:]),
        rows=tuple(rows),
        constant_answer=renamed(summary.constant_answer),
    )


@pytest.mark.parametrize("task", HOSTILE, ids=ascii)
@pytest.mark.parametrize("ranked", [False, True])
def test_any_name_of_a_task_is_printed(summary: Summary, task: str, ranked: bool) -> None:
    console = Console(width=400, file=io.StringIO(), force_terminal=False)  # with markup, as it is by default
    show_summary(named(summary, task), Path("[/x]"), console, ranked=ranked)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert is_printable(text.replace("\n", ""))
    assert "Everything is in [/x]" in text
    if task.isprintable() and len(task) < 30:
        assert text.count(task) >= 2  # in the table and below it


@pytest.mark.filterwarnings("ignore:Glyph .* missing:UserWarning")
@pytest.mark.filterwarnings("ignore:constrained_layout not applied:UserWarning")
@pytest.mark.parametrize("task", HOSTILE, ids=ascii)
def test_any_name_of_a_task_is_drawn(summary: Summary, task: str) -> None:
    assert plot.render(named(summary, task)).startswith(b"\x89PNG")


def test_a_spec_with_the_signs_of_a_formula_is_drawn(summary: Summary) -> None:
    rows = [
        dataclasses.replace(row, label="odd:of=$\\frac{$", spec="odd:of=$\\frac{$") for row in summary.rows
    ]
    assert plot.render(dataclasses.replace(summary, rows=tuple(rows))).startswith(b"\x89PNG")


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_json_for_the_terminal_is_printable_and_the_same_data(text: str) -> None:
    written = printable_json({text: [text, 1.5, None]})
    assert json.loads(written) == {text: [text, 1.5, None]}
    assert is_printable(written.replace("\n", ""))
    assert json.loads(printable_json("\U000e0001 tag")) == "\U000e0001 tag"


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_errors_and_verifications_are_printable(text: str) -> None:
    found = Verification(
        folder="x",
        lines=1,
        calls=1,
        answers=1,
        same_answers=0,
        same_receipts=0,
        differences=(Difference(f"trim, example {text}", f"answer was {text}"),),
        notes=(text,),
    )
    assert is_printable(str(found).replace("\n", ""))
    assert is_printable(str(KVPruneError(f"path {text}")).replace("\n", ""))


class Tokenizer:
    all_special_tokens = ("<s>",)
    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012


class Processor:
    tokenizer = Tokenizer()
    image_token = "<image>"

    def apply_chat_template(self, *_: Any, **__: Any) -> str:
        return "prompt"


@pytest.mark.parametrize("token", ["<s>", "<image>"])
def test_a_question_with_a_special_token_is_refused_with_its_example(token: str) -> None:
    generator = PictureGenerator(model=None, processor=Processor(), max_new_tokens=1)
    plain, odd = example(1), dataclasses.replace(example(2), question=f"what is {token}?")
    generator.check([plain])
    with pytest.raises(DataError, match=rf"example 'e2' contains '{token}', .* without it"):
        generator.check([plain, odd])
