"""Rows, examples and answers to build tests of comparisons from."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from kvprune.comparison import Settings
from kvprune.comparison.data.examples import Example, Question, Utterance
from kvprune.comparison.statistics.contrasts import Contrast
from kvprune.comparison.storage.answers import Answer, Transcript


def row(**changes: Any) -> dict[str, Any]:
    """A good row with changes; a value of None removes the field."""
    whole = {"image": "good.png", "question": "what?", "answers": ["red"], **changes}
    return {field: value for field, value in whole.items() if value is not None}


def example(number: int, task: str = "read", answers: tuple[str, ...] = ("7",)) -> Example:
    return Question(
        id=f"e{number}",
        task=task,
        file=Path("none.png"),
        question="which?",
        answers=answers,
        file_sha256=f"{number:064x}",
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


def utterance(number: int, task: str = "clean") -> Utterance:
    return Utterance(
        id=f"u{number}",
        task=task,
        answers=("good morning",),
        file=Path("none.wav"),
        file_sha256=f"{number:064x}",
        language="en",
        seconds=4.0,
    )


def transcript(spec: str, of: Example, errors: int, words: int, **changes: Any) -> Transcript:
    """A transcript with so many wrong words; three characters are wrong for each, of five in a word."""
    good = Transcript(
        spec=spec,
        id=of.id,
        task=of.task,
        answer="good morning",
        correct=not errors,
        agrees_with_full=not errors,
        finished=True,
        kept_fraction=1.0,
        bytes_held=1000,
        bytes_full=1000,
        receipt="0" * 64,
        word_errors=errors,
        words=words,
        character_errors=3 * errors,
        characters=5 * words,
        tokens=20,
        cap=60,
        loops=False,
    )
    return dataclasses.replace(good, **changes)


def contrast(value: float, low: float, high: float, **changes: Any) -> Contrast:
    """A comparison with a partner on ten examples."""
    good = Contrast(
        value=value,
        low=low,
        high=high,
        lost=1,
        gained=2,
        pairs=10,
        p_value=0.5,
        disagreement=0.3,
        needed={"2": 5885, "5": 940, "10": 234},
    )
    return dataclasses.replace(good, **changes)


SMALL_POLICIES = ("trim", "random:reach=onward", "lossless")
SMALL_RATIOS = (0.25,)
SMALL_SPECS = ("full", "trim:keep_ratio=0.25", "random:keep_ratio=0.25,reach=onward", "lossless")


def small_settings(output: Path, **changes: Any) -> Settings:
    small = {"tasks": ("read", "count"), "limit": 2, "batch_size": 3, "max_new_tokens": 3, "repetitions": 1}
    return Settings(output=output, **{**small, **changes})


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file of a folder, by its path inside it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }
