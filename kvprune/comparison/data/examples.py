"""Examples: what a model is asked, and which answers are right; reads and checks questions about pictures."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from kvprune.comparison.data.pictures import read_picture
from kvprune.comparison.data.safe_json import parse
from kvprune.errors import DataError
from kvprune.text import suggestion

DEFAULT_TASK = "all"
"""Task of a row that names no task."""

_ROW = '{"image": "picture.png", "question": "...", "answers": ["..."]}'
"""A good row, for messages."""


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


@dataclass(frozen=True, kw_only=True)
class Utterance(Example):
    """One recording to write down; `answers` holds its reference text alone.

    Attributes:
        language: language that is spoken, as Whisper names it, such as ``en``.
        seconds: length of the recording.
    """

    kind = "speech"

    language: str
    seconds: float

    @property
    def reference(self) -> str:
        """The text that was spoken."""
        return self.answers[0]

    @property
    def content(self) -> list[object]:
        """What can change a result, as JSON values."""
        return [*super().content, self.language]


def read_examples(path: Path) -> tuple[Example, ...]:
    """Read and check every row; every picture is decoded once.

    Args:
        path: JSON-lines file; image paths in it are relative to its folder, or absolute.

    Raises:
        DataError: If the file cannot be read, or a row is wrong; names file, line, field and what would be
            right.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"no data file at {path}; expected a JSON-lines file with rows like {_ROW}") from None
    except OSError as error:
        raise DataError(f"cannot read data file {path}: {error.strerror or error}") from error
    examples: list[Example] = []
    lines: dict[str, int] = {}
    for number, row in _rows(path, raw):
        example = _example(path, number, row)
        if example.id in lines:
            raise DataError(
                f"{path}, line {number}: id {example.id!r} is already used in line {lines[example.id]}; "
                "ids must be unique"
            )
        lines[example.id] = number
        examples.append(example)
    if not examples:
        raise DataError(f"{path} holds no rows; expected rows like {_ROW}")
    return tuple(examples)


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


def normalise(text: str) -> str:
    """Return text as it is compared: case folded, runs of white space made one space, none at the ends."""
    return " ".join(text.casefold().split())


def is_correct(answer: str, answers: Sequence[str]) -> bool:
    """Whether `answer` equals one of `answers` after `normalise`."""
    return normalise(answer) in {normalise(right) for right in answers}


def _rows(path: Path, raw: bytes) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse(line)
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, line {number}: byte {error.start + 1} is not UTF-8") from error
        except ValueError as error:
            raise DataError(
                f"{path}, line {number}: not JSON ({error}); expected one object per line like {_ROW}"
            ) from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: a {_kind(row)} where an object like {_ROW} is expected")
        yield number, row


def _example(path: Path, number: int, row: Mapping[str, Any]) -> Question:
    where = f"{path}, line {number}"
    for field in ("image", "question", "answers"):
        if field not in row:
            raise DataError(
                f"{where}: field {field!r} is missing{_similar_field(field, row)} "
                f"(the row has: {', '.join(row) or 'nothing'})"
            )
    name = row.get("id", f"row-{number}")
    if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "":
        raise DataError(f"{where}: field 'id' is {name!r}; it must be a non-empty string or a whole number")
    answers = _answers(where, row)
    image = path.parent / _text(where, row, "image")
    return Question(
        id=str(name),
        task=_text(where, row, "task") if "task" in row else DEFAULT_TASK,
        file=image,
        question=_text(where, row, "question"),
        answers=answers,
        file_sha256=_image_digest(where, image),
    )


def _similar_field(field: str, row: Mapping[str, Any]) -> str:
    """Return a question about the most similar field that a row has, or nothing."""
    if field == "answers" and "answer" in row:
        return "; is 'answer' meant?"
    near = difflib.get_close_matches(field, list(row), n=1)
    return f"; is {near[0]!r} meant?" if near else ""


def _answers(where: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    answers = row["answers"]
    if not isinstance(answers, list) or not answers:
        raise DataError(f"{where}: field 'answers' is {answers!r}; it must be a list of strings")
    for answer in answers:
        if not isinstance(answer, str) or not normalise(answer):
            raise DataError(
                f"{where}: field 'answers' holds {answer!r}; every answer must be a non-empty string"
            )
    return tuple(answers)


def _text(where: str, row: Mapping[str, Any], field: str) -> str:
    value = row[field]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: field {field!r} is {value!r}; it must be a non-empty string")
    return value


def _image_digest(where: str, image: Path) -> str:
    try:
        _, content = read_picture(image)
    except DataError as error:
        raise DataError(f"{where}: field 'image': {error}") from error
    return hashlib.sha256(content).hexdigest()


def _kind(value: object) -> str:
    return {list: "list", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")
