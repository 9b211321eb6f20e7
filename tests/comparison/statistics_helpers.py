"""Utterances, transcripts and comparisons with a partner, to build tests of statistics from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from kvprune.comparison.data.examples import Example, Utterance
from kvprune.comparison.statistics.contrasts import Contrast
from kvprune.comparison.storage.answers import Transcript


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
