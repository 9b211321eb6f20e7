"""The tasks of the demo: questions about a picture that have exactly one right answer.

Each question needs one to three glyphs of a picture that shows about thirty, or, to count and to rule
something out, those of one kind or colour.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvprune.demo.glyphs import GLYPHS, KINDS, kind_of
from kvprune.demo.pictures import COLOURS, Glyph

__all__ = ["COUNTS", "LESSONS", "TASKS", "WORDS", "Query", "ask", "check_task"]

COUNTS = (0, 1, 2, 3, 4, 5)
"""How many glyphs there can be to count."""

WORDS = (
    *("which", "what", "where", "how", "many", "is", "are", "there", "at", "of", "the", "a", "and", "or"),
    *("read", "from", "to", "left", "right", "above", "below", "yes", "no", "?", ",", "."),
    *(f"{kind}{ending}" for kind in KINDS for ending in ("", "s")),
)
"""All words of questions and answers, without glyphs, colours and cells."""

_ROW = 3  # how many glyphs a row to read has
_SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


@dataclass(frozen=True)
class Query:
    """A question about a picture.

    Attributes:
        task: one of `TASKS`.
        question: the text of the question.
        answer: the one right answer.
    """

    task: str
    question: str
    answer: str


def check_task(task: str) -> None:
    """Raise unless there is a task of this name.

    Raises:
        ValueError: If `task` is not one of `TASKS`.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; tasks are {', '.join(TASKS)}")


def ask(task: str, rng: np.random.Generator, glyphs: Sequence[Glyph]) -> Query | None:
    """Draw a question of a task about a picture; None where the picture permits none.

    Args:
        task: One of `LESSONS`.
        rng: Source of all randomness.
        glyphs: All glyphs of the picture.

    Raises:
        KeyError: If `task` is not one of `LESSONS`.
    """
    made = _LESSONS[task](rng, glyphs)
    return None if made is None else Query(task, *made)


def _read(rng: np.random.Generator, glyphs: Sequence[Glyph]) -> tuple[str, str] | None:
    """Ask for the one glyph of a kind that has a colour."""
    found: dict[tuple[str, str], list[Glyph]] = {}
    for glyph in glyphs:
        found.setdefault((kind_of(glyph.name), glyph.colour), []).append(glyph)
    single = [(kind, colour, alike[0]) for (kind, colour), alike in found.items() if len(alike) == 1]
    if not single:
        return None
    kind, colour, glyph = single[int(rng.integers(len(single)))]
    return f"which {kind} is {colour}?", glyph.name


def _place(rng: np.random.Generator, glyphs: Sequence[Glyph]) -> tuple[str, str]:
    """Ask what a cell holds."""
    glyph = glyphs[int(rng.integers(len(glyphs)))]
    return f"what is at {glyph.cell}?", glyph.name


def _beside(rng: np.random.Generator, glyphs: Sequence[Glyph]) -> tuple[str, str] | None:
    """Ask in which cell something lies beside a glyph that is there only once, and what it is."""
    at = {(glyph.row, glyph.column): glyph for glyph in glyphs}
    looks = [(glyph.colour, glyph.name) for glyph in glyphs]
    possible = [
        (side, glyph, at[glyph.row + down, glyph.column + across])
        for glyph, look in zip(glyphs, looks, strict=True)
        if looks.count(look) == 1
        for side, (down, across) in _SIDES.items()
        if (glyph.row + down, glyph.column + across) in at
    ]
    if not possible:
        return None
    side, glyph, neighbour = possible[int(rng.integers(len(possible)))]
    question = f"where and what is {side} the {glyph.colour} {glyph.name}?"
    return question, f"{neighbour.cell} {neighbour.name}"


def _where(rng: np.random.Generator, glyphs: Sequence[Glyph]) -> tuple[str, str] | None:
    """Ask in which cell something is that is there only once."""
    looks = [(glyph.colour, glyph.name) for glyph in glyphs]
    single = [glyph for glyph, look in zip(glyphs, looks, strict=True) if looks.count(look) == 1]
    if not single:
        return None
    glyph = single[int(rng.integers(len(single)))]
    return f"where is the {glyph.colour} {glyph.name}?", glyph.cell


def _count(rng: np.random.Generator, glyphs: Sequence[Glyph]) -> tuple[str, str]:
    """Ask how many glyphs of a kind have a colour; numbers that the picture offers are equally frequent."""
    looks = [(kind_of(glyph.name), glyph.colour) for glyph in glyphs]
    pairs = {(kind, colour): looks.count((kind, colour)) for kind in KINDS for colour in COLOURS}
    numbers = sorted({number for number in pairs.values() if number <= max(COUNTS)})
    number = numbers[int(rng.integers(len(numbers)))]
    possible = [pair for pair, found in pairs.items() if found == number]
    kind, colour = possible[int(rng.integers(len(possible)))]
    return f"how many {kind}s are {colour}?", str(number)


def _row(rng: np.random.Generator, glyphs: Sequence[Glyph]) -> tuple[str, str] | None:
    """Ask for three glyphs beside each other, from left to right."""
    at = {(glyph.row, glyph.column): glyph for glyph in glyphs}
    starts = [(row, column) for row, column in at if all((row, column + step) in at for step in range(_ROW))]
    if not starts:
        return None
    row, column = starts[int(rng.integers(len(starts)))]
    read = [at[row, column + step] for step in range(_ROW)]
    return f"read from {read[0].cell} to {read[-1].cell}.", " ".join(glyph.name for glyph in read)


def _compare(rng: np.random.Generator, glyphs: Sequence[Glyph]) -> tuple[str, str] | None:
    """Ask which of two cells has a colour; one of them has."""
    first, second = (glyphs[int(index)] for index in rng.choice(len(glyphs), 2, replace=False))
    if first.colour == second.colour:
        return None
    wanted = (first, second)[int(rng.integers(2))]
    return f"which is {wanted.colour}, {first.cell} or {second.cell}?", wanted.cell


def _presence(rng: np.random.Generator, glyphs: Sequence[Glyph]) -> tuple[str, str]:
    """Ask whether a glyph of a colour is there; half of them are.

    In half of the questions about something absent, both the glyph and the colour are there, but not
    together. In the other half the glyph is nowhere in the picture.
    """
    looks = {(glyph.colour, glyph.name) for glyph in glyphs}
    names = sorted({glyph.name for glyph in glyphs})
    colours = sorted({glyph.colour for glyph in glyphs})
    if rng.random() < 0.5:
        glyph = glyphs[int(rng.integers(len(glyphs)))]
        return f"is there a {glyph.colour} {glyph.name}?", "yes"
    apart = [(colour, name) for colour in colours for name in names if (colour, name) not in looks]
    absent = [(colour, name) for colour in colours for name in GLYPHS if name not in names]
    chosen = (apart if rng.random() < 0.5 else absent) or apart or absent
    colour, name = chosen[int(rng.integers(len(chosen)))]
    return f"is there a {colour} {name}?", "no"


_QUESTIONS: dict[str, Callable[[np.random.Generator, Sequence[Glyph]], tuple[str, str] | None]] = {
    "read": _read,
    "place": _place,
    "beside": _beside,
    "count": _count,
    "row": _row,
    "compare": _compare,
    "presence": _presence,
}

_LESSONS = {**_QUESTIONS, "where": _where}

LESSONS = tuple(_LESSONS)
"""What training asks: the tasks, and in addition `where` something is, which other tasks build on."""

TASKS = tuple(_QUESTIONS)
"""`read` the glyph of a colour, at a `place`, or `beside` another; `count` a kind; read a `row`; `compare`
the colours of two places; say whether something is there (`presence`)."""
