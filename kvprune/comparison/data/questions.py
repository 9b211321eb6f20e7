"""Questions about pictures, and the rows that hold them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from kvprune.comparison.data.example import Example, normalise
from kvprune.comparison.data.pictures import read_picture
from kvprune.comparison.data.rows import Row
from kvprune.errors import DataError

__all__ = ["FIELDS", "Question", "read_question"]

FIELDS = ("image", "question", "answers")
"""Fields that a row must have."""


@dataclass(frozen=True, kw_only=True)
class Question(Example):
    """One question about one picture.

    Attributes:
        question: text that follows the picture in the user's turn.
    """

    kind = "pictures"

    question: str

    @property
    def content(self) -> list[object]:
        """What can change a result, as JSON values."""
        return [self.id, self.task, self.question, list(self.answers), self.file_sha256]


def read_question(row: Row) -> Question:
    """Read and check one row; the picture is decoded once.

    Raises:
        DataError: If a field is wrong, or the picture cannot be read.
    """
    row.require(FIELDS)
    name, answers = row.id, _answers(row)
    image = row.folder / row.text("image")
    return Question(
        id=name,
        task=row.task,
        file=image,
        question=row.text("question"),
        answers=answers,
        file_sha256=_digest(row, image),
    )


def _answers(row: Row) -> tuple[str, ...]:
    answers = row.fields["answers"]
    if not isinstance(answers, list) or not answers:
        raise row.wrong("answers", "it must be a list of strings")
    for answer in answers:
        if not isinstance(answer, str) or not normalise(answer):
            raise DataError(
                f"{row.where}: field 'answers' holds {answer!r}; every answer must be a non-empty string"
            )
    return tuple(answers)


def _digest(row: Row, image: Path) -> str:
    try:
        _, content = read_picture(image)
    except DataError as error:
        raise DataError(f"{row.where}: field 'image': {error}") from error
    return hashlib.sha256(content).hexdigest()
