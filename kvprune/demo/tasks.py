"""The three tasks of the demo: what a picture has to show, the question, and its one right answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvprune.demo.handwriting import Handwriting
from kvprune.demo.pictures import (
    COLOURS,
    ROW_GAP,
    SHAPES,
    Digit,
    NoRoomError,
    Picture,
    paint,
    place,
    random_size,
)

TASKS = ("read", "count", "row")
"""`read` one digit, `count` digits, read a `row` of digits."""

ROW_LENGTHS = (3, 4, 5, 6)
"""How many digits a row can have in training."""

EXAMPLE_ROW_LENGTHS = (3,)
"""How many digits a row can have in examples: as many as the model reads reliably."""

COUNTS = (0, 1, 2, 3, 4, 5)
"""How many digits there can be to count."""


@dataclass(frozen=True)
class Query:
    """A question about a picture.

    Attributes:
        task: one of `TASKS`.
        colour: the colour that the question names.
        question: the text of the question.
        answer: the one right answer.
    """

    task: str
    colour: str
    question: str
    answer: str


def check_task(task: str) -> None:
    """Raise unless there is a task of this name.

    Raises:
        ValueError: If `task` is not one of `TASKS`.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; tasks are {', '.join(TASKS)}")


def ask(task: str, colour: str, digits: Sequence[Digit]) -> Query | None:
    """Return the question of a task about digits of a colour, or None where its answer would be ambiguous.

    Args:
        task: One of `TASKS`.
        colour: One of `COLOURS`.
        digits: All digits of the picture.

    Raises:
        ValueError: If `task` is not one of `TASKS`.
    """
    check_task(task)
    matching = sorted((digit for digit in digits if digit.colour == colour), key=lambda digit: digit.x)
    if task == "read":
        if len(matching) != 1:
            return None
        return Query(task, colour, f"which digit is {colour}?", str(matching[0].value))
    if task == "count":
        if len(matching) > max(COUNTS):
            return None
        return Query(task, colour, f"how many digits are {colour}?", str(len(matching)))
    gaps = np.diff([digit.x for digit in matching])
    if len(matching) not in ROW_LENGTHS or bool((gaps < ROW_GAP - 0.01).any()):
        return None
    answer = " ".join(str(digit.value) for digit in matching)
    return Query(task, colour, f"read the {colour} digits from left to right.", answer)


def compose(
    task: str,
    rng: np.random.Generator,
    hand: Handwriting,
    shape: tuple[int, int] | None = None,
    row_lengths: tuple[int, ...] = ROW_LENGTHS,
) -> tuple[Picture, Query]:
    """Make a picture and a question of a task; counts, row lengths and shapes are equally frequent.

    Args:
        task: One of `TASKS`.
        rng: Source of all randomness.
        hand: Handwriting to use.
        shape: Tiles down and across; drawn from `SHAPES` where None.
        row_lengths: How many digits a row can have.

    Raises:
        ValueError: If `task` is not one of `TASKS`.
    """
    check_task(task)
    wanted = {"read": (1,), "count": COUNTS, "row": row_lengths}[task]
    down, across = shape if shape is not None else SHAPES[int(rng.integers(len(SHAPES)))]
    tiles = down * across
    names = [str(name) for name in rng.permutation(COLOURS)]
    asked, others = names[0], names[1 : 1 + int(rng.integers(2, len(names)))]
    number = int(rng.choice(wanted))
    distractors = int(rng.integers(2, 5)) if tiles == 1 else int(rng.integers(tiles + 1, 2 * tiles + 4))
    colours = [asked] * number + [str(name) for name in rng.choice(others, distractors)]
    height, width = random_size(rng, (down, across))
    while True:
        try:
            digits = place(rng, height, width, colours, in_a_row=asked if task == "row" else None)
            break
        except NoRoomError:
            colours.pop()  # removes a digit that is not asked about; those asked about come first and fit
    query = ask(task, asked, digits)
    assert query is not None
    return paint(rng, height, width, digits, hand), query
