"""Questions about pictures: reads a JSON-lines file, validates every row, judges answers."""

from __future__ import annotations

import difflib
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvprune.comparison.data.safe_json import parse
from kvprune.errors import DataError
from kvprune.text import suggestion

if TYPE_CHECKING:
    from PIL import Image

DEFAULT_TASK = "all"
"""Task of a row that names none."""

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Pictures that are data. Pillow would also open EPS, which is a program that Ghostscript runs."""

_ROW = '{"image": "picture.png", "question": "...", "answers": ["..."]}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One question about one picture.

    Attributes:
        id: unique in its file.
        task: group that the accuracy is reported for.
        image: file of the picture.
        question: text that follows the picture in the user's turn.
        answers: right answers, any of which counts.
        image_sha256: digest of the image file.
    """

    id: str
    task: str
    image: Path
    question: str
    answers: tuple[str, ...]
    image_sha256: str


def read_examples(path: Path) -> tuple[Example, ...]:
    """Read and validate every row; every picture is really decoded.

    Args:
        path: JSON-lines file; image paths in it are relative to its folder, or absolute.

    Raises:
        DataError: naming the file, the line, the field, and what would be right.
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
    """The first `limit` examples of each task, in file order.

    Args:
        examples: what `read_examples` returned.
        tasks: tasks to keep; None keeps all.
        limit: examples per task; None keeps all.

    Raises:
        DataError: a task that no example has, or a limit below 1.
    """
    known = list(dict.fromkeys(example.task for example in examples))
    for task in tasks or ():
        if task not in known:
            raise DataError(
                f"unknown task {task!r}{suggestion(task, known)}; the data has: {', '.join(known)}"
            )
    if tasks is not None and not tasks:
        raise DataError(f"no task chosen; the data has: {', '.join(known)}")
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; it must be at least 1 example per task")
    taken = dict.fromkeys(known if tasks is None else tasks, 0)
    chosen: list[Example] = []
    for example in examples:
        if example.task in taken and (limit is None or taken[example.task] < limit):
            taken[example.task] += 1
            chosen.append(example)
    return tuple(chosen)


def digest(examples: Sequence[Example]) -> str:
    """SHA-256 over everything that can change a result: ids, tasks, questions, answers and image bytes."""
    rows = [[e.id, e.task, e.question, list(e.answers), e.image_sha256] for e in examples]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()


def normalise(text: str) -> str:
    """Text as it is compared: case folded, runs of white space made one space, none at the ends."""
    return " ".join(text.casefold().split())


def is_correct(answer: str, answers: Sequence[str]) -> bool:
    """Whether `answer` equals one of `answers` after `normalise`."""
    return normalise(answer) in {normalise(right) for right in answers}


def read_picture(path: Path) -> tuple[Image.Image, bytes]:
    """Return a picture, decoded and in RGB, and the bytes of its file.

    Raises:
        DataError: If there is none, it is no plain file, of another format, cut or damaged, or has more
            pixels than Pillow takes for safe.
    """
    from PIL import Image

    try:
        if path.exists() and not path.is_file():
            raise DataError(f"{path} is no plain file")
        content = path.read_bytes()
        Image.init()
        formats = [name for name in _FORMATS if name in Image.OPEN]
        with Image.open(io.BytesIO(content), formats=formats) as picture:
            return picture.convert("RGB"), content
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"no file at {path}; paths are relative to {path.parent}") from None
    except Exception as error:  # decoders of damaged pictures raise whatever they stumble over
        raise DataError(f"{path} is no readable picture ({error or type(error).__name__})") from error


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


def _example(path: Path, number: int, row: Mapping[str, Any]) -> Example:
    where = f"{path}, line {number}"
    for field in ("image", "question", "answers"):
        if field not in row:
            near = "answer" if field == "answers" and "answer" in row else None
            near = near or next(iter(difflib.get_close_matches(field, list(row), n=1)), None)
            hint = f"; is {near!r} meant?" if near else ""
            raise DataError(
                f"{where}: field {field!r} is missing{hint} (the row has: {', '.join(row) or 'nothing'})"
            )
    name = row.get("id", f"row-{number}")
    if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "":
        raise DataError(f"{where}: field 'id' is {name!r}; it must be a non-empty string or a whole number")
    answers = row["answers"]
    if not isinstance(answers, list) or not answers:
        raise DataError(f"{where}: field 'answers' is {answers!r}; it must be a list of strings")
    for answer in answers:
        if not isinstance(answer, str) or not normalise(answer):
            raise DataError(
                f"{where}: field 'answers' holds {answer!r}; every answer must be a non-empty string"
            )
    image = path.parent / _text(where, row, "image")
    return Example(
        id=str(name),
        task=_text(where, row, "task") if "task" in row else DEFAULT_TASK,
        image=image,
        question=_text(where, row, "question"),
        answers=tuple(answers),
        image_sha256=_image_digest(where, image),
    )


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
