"""Examples: what a model is asked, and which answers are right; reads and checks a file of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from kvprune.comparison.data import questions, utterances
from kvprune.comparison.data.example import DEFAULT_TASK, Example, Kind, is_correct, normalise
from kvprune.comparison.data.questions import Question, read_question
from kvprune.comparison.data.rows import GOOD_ROWS, Row, read_rows
from kvprune.comparison.data.utterances import Utterance, read_utterance
from kvprune.errors import DataError
from kvprune.text import suggestion

__all__ = [
    "DEFAULT_TASK",
    "Example",
    "Kind",
    "Question",
    "Utterance",
    "choose",
    "choose_tasks",
    "digest",
    "is_correct",
    "kind_of",
    "normalise",
    "read_examples",
]


def read_examples(path: Path) -> tuple[Example, ...]:
    """Read and check every row; every picture or recording is decoded once.

    The fields of the rows say what they are: questions about pictures, or recordings with their text. All
    rows of a file are of one kind.

    Args:
        path: JSON-lines file; paths in it are relative to its folder, or absolute.

    Raises:
        DataError: If the file cannot be read, a row is wrong, or rows are of two kinds; names file, line,
            field and what would be right.
        ModuleNotFoundError: If a package that reads the files is missing; says how to install it.
    """
    examples: list[Example] = []
    lines: dict[str, int] = {}
    first: tuple[Kind, int] | None = None
    for row in read_rows(path):
        kind = _kind(row)
        first = first or (kind, row.number)
        if kind != first[0]:
            raise DataError(
                f"{row.where}: this row is about {kind}, but line {first[1]} is about {first[0]}; a file "
                "holds one kind, so put the others in a file of their own"
            )
        example = read_utterance(row) if kind == "speech" else read_question(row)
        if example.id in lines:
            raise DataError(
                f"{row.where}: id {example.id!r} is already used in line {lines[example.id]}; "
                "ids must be unique"
            )
        lines[example.id] = row.number
        examples.append(example)
    if not examples:
        raise DataError(f"{path} holds no rows; expected rows like {GOOD_ROWS}")
    return tuple(examples)


def kind_of(path: Path) -> Kind:
    """Return what a file is about, by its first row alone.

    Raises:
        DataError: If there is none, or it is damaged.
    """
    for row in read_rows(path):
        return _kind(row)
    raise DataError(f"{path} holds no rows; expected rows like {GOOD_ROWS}")


def _kind(row: Row) -> Kind:
    """Return what a row is about; one without any field of either kind counts as a question.

    Raises:
        DataError: If it has fields of both kinds.
    """
    spoken = [name for name in utterances.FIELDS if name in row.fields]
    seen = [name for name in questions.FIELDS if name in row.fields]
    if spoken and seen:
        raise DataError(
            f"{row.where}: the row has {', '.join(map(repr, seen))} of a question about a picture and "
            f"{', '.join(map(repr, spoken))} of a recording; write one kind of row: {GOOD_ROWS}"
        )
    return "speech" if spoken else "pictures"


def choose(
    examples: Sequence[Example], tasks: Sequence[str] | None, limit: int | None
) -> tuple[Example, ...]:
    """Return the first `limit` examples of each task, in file order.

    Args:
        examples: What `read_examples` returned.
        tasks: Tasks to keep; None keeps all.
        limit: Examples per task; None keeps all.

    Raises:
        DataError: If no example has one of the tasks, or the limit is below 1.
    """
    known = tuple(dict.fromkeys(example.task for example in examples))
    taken = dict.fromkeys(choose_tasks(tasks, known, "data"), 0)
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; it must be at least 1 example per task")
    chosen: list[Example] = []
    for example in examples:
        if example.task in taken and (limit is None or taken[example.task] < limit):
            taken[example.task] += 1
            chosen.append(example)
    return tuple(chosen)


def choose_tasks(tasks: Sequence[str] | None, known: Sequence[str], source: str) -> tuple[str, ...]:
    """Return the chosen tasks in the order of `known`.

    Args:
        tasks: Tasks to keep; None keeps all.
        known: All tasks there are.
        source: What has these tasks, for messages.

    Raises:
        DataError: If there is no such task, or none is chosen.
    """
    for task in tasks or ():
        if task not in known:
            raise DataError(
                f"unknown task {task!r}{suggestion(task, known)}; the {source} has: {', '.join(known)}"
            )
    if tasks is not None and not tasks:
        raise DataError(f"no task chosen; the {source} has: {', '.join(known)}")
    return tuple(task for task in known if tasks is None or task in tasks)


def digest(examples: Sequence[Example]) -> str:
    """Return the SHA-256 of what can change a result: the content of each example, in this order."""
    rows = [example.content for example in examples]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()
