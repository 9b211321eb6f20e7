"""A JSON-lines file that grows batch by batch and survives being killed at any byte."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvprune.errors import ResultsError

__all__ = ["Journal", "write_atomically", "write_json"]


class Journal:
    """Appends objects to a file, one per line; what was appended is on disk when `append` returns.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def recover(self) -> list[dict[str, Any]]:
        """Cut an unfinished last line off the file and return the objects before it, in file order.

        Raises:
            ResultsError: If a finished line is no JSON object; the file is left as it is.
        """
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            return []
        finished = raw.rfind(b"\n") + 1
        rows = [
            self._parse(number, line) for number, line in enumerate(raw[:finished].split(b"\n")[:-1], start=1)
        ]
        if finished < len(raw):
            with self.path.open("r+b") as file:
                file.truncate(finished)
                os.fsync(file.fileno())
        return rows

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add one line per row, in one write."""
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        with self.path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            row = json.loads(line.decode())
        except ValueError as error:
            shown = line[:60].decode(errors="replace")
            raise ResultsError(
                f"{self.path}, line {number} is damaged ({error}): {shown!r}; "
                "delete this line to have it computed again, or choose another --output"
            ) from error
        if not isinstance(row, dict):
            raise ResultsError(
                f"{self.path}, line {number} is damaged: {row!r} is no JSON object; delete this line"
            )
        return row


def write_json(path: Path, value: object) -> None:
    """Replace a file by the indented JSON of `value`; readers see the old one or the new one, whole."""
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file by `content`; readers see the old one or the new one, whole."""
    handle, name = tempfile.mkstemp(prefix=".kvprune-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
