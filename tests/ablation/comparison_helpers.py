"""Rows, examples and answers to build tests of comparisons from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvprune.ablation.answers import Answer
from kvprune.ablation.data import Example


def row(**changes: Any) -> dict[str, Any]:
    """A good row with changes; a value of None removes the field."""
    whole = {"image": "good.png", "question": "what?", "answers": ["red"], **changes}
    return {field: value for field, value in whole.items() if value is not None}


def example(number: int, task: str = "read", answers: tuple[str, ...] = ("7",)) -> Example:
    return Example(
        id=f"e{number}",
        task=task,
        image=Path("none.png"),
        question="which?",
        answers=answers,
        image_sha256=f"{number:064x}",
    )


def answer(spec: str, of: Example, text: str, full: str = "7", kept: float = 1.0) -> Answer:
    return Answer(
        spec=spec,
        id=of.id,
        task=of.task,
        answer=text,
        correct=text in of.answers,
        agrees_with_full=text == full,
        finished=True,
        kept_fraction=kept,
        bytes_held=round(1000 * kept),
        bytes_full=1000,
        receipt=f"{round(1e6 * kept):064x}",
    )
