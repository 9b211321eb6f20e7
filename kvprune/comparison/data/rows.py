"""Reads the rows of a JSON-lines file, and the fields that all kinds of rows have."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvprune.comparison.data.example import DEFAULT_TASK
from kvprune.comparison.data.safe_json import parse
from kvprune.errors import DataError
from kvprune.text import shown

__all__ = ["GOOD_ROWS", "Row", "read_rows"]

GOOD_ROWS = (
    '{"image": "picture.png", "question": "...", "answers": ["..."]} or '
    '{"audio": "speech.flac", "text": "..."}'
)
"""Good rows, for messages."""


class Row:
    """One row of a data file.

    Args:
        path: The data file.
        number: The line of the row, counted from 1.
        fields: The JSON object.
    """

    def __init__(self, path: Path, number: int, fields: Mapping[str, Any]) -> None:
        self.folder, self.number, self.fields = path.parent, number, fields
        self.where = f"{path}, line {number}"

    def require(self, names: Sequence[str]) -> None:
        """Raise unless the row has all of these fields.

        Raises:
            DataError: Names the first one that is missing, and the field that is meant if one is similar.
        """
        for name in names:
            if name not in self.fields:
                raise DataError(
                    f"{self.where}: field {name!r} is missing{self._similar(name)} "
                    f"(the row has: {', '.join(self.fields) or 'nothing'})"
                )

    def text(self, name: str, default: str | None = None) -> str:
        """Return a field that is a non-empty string; `default` where the row has no such field.

        Raises:
            DataError: If the field is something else.
        """
        if default is not None and name not in self.fields:
            return default
        value = self.fields[name]
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(name, "it must be a non-empty string")
        return value

    def wrong(self, name: str, right: str) -> DataError:
        """Return the error about a field's value; `right` says what the value must be."""
        return DataError(f"{self.where}: field {name!r} is {shown(self.fields[name])}; {right}")

    @property
    def id(self) -> str:
        """The id that the row gives, or ``row-`` and the line.

        Raises:
            DataError: If the id is neither a non-empty string nor a whole number.
        """
        name = self.fields.get("id", f"row-{self.number}")
        if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "":
            raise self.wrong("id", "it must be a non-empty string or a whole number")
        return str(name)

    @property
    def task(self) -> str:
        """The task of the row; see `text` for the errors."""
        return self.text("task", DEFAULT_TASK)

    def _similar(self, name: str) -> str:
        """Return a question about the most similar field that the row has, or nothing."""
        if name == "answers" and "answer" in self.fields:
            return "; is 'answer' meant?"
        near = difflib.get_close_matches(name, list(self.fields), n=1)
        return f"; is {near[0]!r} meant?" if near else ""


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON-lines file; empty lines are left out.

    Raises:
        DataError: If the file cannot be read, or a line is no JSON object.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"no data file at {path}; expected a JSON-lines file with rows like {GOOD_ROWS}"
        ) from None
    except OSError as error:
        raise DataError(f"cannot read data file {path}: {error.strerror or error}") from error
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = parse(line)
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: byte {error.start + 1} is not UTF-8") from error
        except ValueError as error:
            raise DataError(
                f"{where}: not JSON ({error}); expected one object per line like {GOOD_ROWS}"
            ) from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: a {_kind(row)} where an object like {GOOD_ROWS} is expected")
        yield Row(path, number, row)


def _kind(value: object) -> str:
    return {list: "list", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")
