"""Files of a results folder: JSON-lines files that survive a kill at any byte, and atomic replacement."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvprune.comparison.data.safe_json import parse
from kvprune.errors import ResultsError

__all__ = [
    "Journal",
    "check_plain_file",
    "parse_line",
    "read_plain_file",
    "remove",
    "write_atomically",
    "write_json",
]


class Journal:
    """A JSON-lines file to append to; what was appended is on disk when `append` returns.

    Args:
        path: The file; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def recover(self) -> list[dict[str, Any]]:
        """Cut an unfinished last line off the file, and return the objects of all others in file order.

        Raises:
            ResultsError: If a finished line is not a JSON object; the file then stays as it is.
        """
        rows, finished = self.read()
        self.cut(finished)
        return rows

    def cut(self, finished: int) -> None:
        """Cut off what comes after the first `finished` bytes: an unfinished last line.

        Raises:
            ResultsError: If the file cannot be written.
        """
        with _typed(self.path, "written"):
            if self.path.exists() and finished < self.path.stat().st_size:
                with self.path.open("r+b") as file:
                    file.truncate(finished)
                    os.fsync(file.fileno())

    def read(self) -> tuple[list[dict[str, Any]], int]:
        """Return the objects of all finished lines in file order, and how many bytes these lines take.

        Raises:
            ResultsError: If the file cannot be read, or a finished line is not a JSON object.
        """
        rows, finished = [], 0
        for number, line in enumerate(self.lines(), start=1):
            rows.append(parse_line(f"{self.path}, line {number}", line))
            finished += len(line) + 1
        return rows, finished

    def lines(self) -> Iterator[bytes]:
        """Yield the finished lines in file order, without their line breaks; the file is not held in memory.

        Raises:
            ResultsError: If the file cannot be read.
        """
        check_plain_file(self.path)
        with _typed(self.path, "read"):
            if not self.path.exists():
                return
            with self.path.open("rb") as file:
                for line in file:
                    if line.endswith(b"\n"):
                        yield line[:-1]

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append one line for each row, all in one write.

        Raises:
            ResultsError: If the file cannot be written; lines that were finished before stay as they are.
        """
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        with _typed(self.path, "written"):
            new = not self.path.exists()
            with self.path.open("ab") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
            if new:
                _sync_folder(self.path.parent)


def parse_line(where: str, line: bytes) -> dict[str, Any]:
    """Return the JSON object of a line.

    Args:
        where: Name of the file and number of the line, for messages.
        line: The line without its line break.

    Raises:
        ResultsError: If the line is damaged, or no object.
    """
    try:
        row = parse(line)
    except ValueError as error:
        shown = line[:60].decode(errors="replace")
        raise ResultsError(
            f"{where} is damaged ({error}): {shown!r}; "
            "delete this line to have it computed again, or choose another --output"
        ) from error
    if not isinstance(row, dict):
        raise ResultsError(f"{where} is damaged: {line[:60]!r} is not a JSON object; delete this line")
    return row


def write_json(path: Path, value: object) -> None:
    """Replace the content of a file by `value` as indented JSON; see `write_atomically`."""
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file. Readers see all of the old content or all of the new one, even after a power cut.

    Raises:
        ResultsError: If the file cannot be written; the old content stays.
    """
    with _typed(path, "written"):
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
        _sync_folder(path.parent)


def remove(path: Path) -> None:
    """Delete a file, if it is there.

    Raises:
        ResultsError: If it cannot be deleted.
    """
    with _typed(path, "deleted"):
        path.unlink(missing_ok=True)


def read_plain_file(path: Path) -> bytes | None:
    """Return the content of a file, or None where there is no file.

    Raises:
        ResultsError: If something other than a plain file is there, or it cannot be read.
    """
    check_plain_file(path)
    with _typed(path, "read"):
        return path.read_bytes() if path.exists() else None


def check_plain_file(path: Path) -> None:
    """Check that there is a plain file or nothing at `path`.

    Raises:
        ResultsError: If a folder, a link, a pipe or a device is there.
    """
    with _typed(path, "read"):
        if path.is_symlink():
            kind = "a symbolic link"
        elif path.is_dir():
            kind = "a folder"
        elif path.exists() and not path.is_file():
            kind = "a pipe or a device"
        else:
            return
        raise ResultsError(
            f"{path} is {kind} where a plain file belongs; move it away, or choose another results folder"
        )


@contextmanager
def _typed(path: Path, done: str) -> Iterator[None]:
    """Turn errors of the file system into ResultsError: "PATH cannot be DONE"."""
    try:
        yield
    except OSError as error:
        raise ResultsError(f"{path} cannot be {done}: {error.strerror or error}") from error


def _sync_folder(folder: Path) -> None:
    """Force the entries of a folder to disk, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError:  # some network file systems refuse this, and do it themselves
            pass
        finally:
            os.close(handle)
