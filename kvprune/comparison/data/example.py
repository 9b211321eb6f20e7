"""What all kinds of examples share: the group they are counted in, and how an answer is compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

__all__ = ["DEFAULT_TASK", "Example", "Kind", "is_correct", "normalise"]

DEFAULT_TASK = "all"
"""Task of a row that names no task."""

Kind = Literal["pictures", "speech"]
"""What a comparison is about: questions about pictures, or recordings to write down."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One thing that a model is asked; `Question` and `Utterance` say what.

    Attributes:
        id: name of the example, unique in its file.
        task: name of the group of examples that it is counted in.
        answers: right answers; each of them counts.
        file: the picture or the recording.
        file_sha256: SHA-256 of that file.
    """

    kind: ClassVar[Kind]

    id: str
    task: str
    answers: tuple[str, ...]
    file: Path
    file_sha256: str

    @property
    def content(self) -> list[object]:
        """What can change a result, as JSON values."""
        return [self.id, self.task, list(self.answers), self.file_sha256]

    @property
    def digest(self) -> str:
        """SHA-256 of `content`."""
        return hashlib.sha256(json.dumps(self.content, ensure_ascii=False).encode()).hexdigest()


def normalise(text: str) -> str:
    """Return text as it is compared: case folded, runs of white space made one space, none at the ends."""
    return " ".join(text.casefold().split())


def is_correct(answer: str, answers: Sequence[str]) -> bool:
    """Whether `answer` equals one of `answers` after `normalise`."""
    return normalise(answer) in {normalise(right) for right in answers}
