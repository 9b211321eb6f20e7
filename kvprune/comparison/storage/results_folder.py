"""A results folder: keeps other processes out, refuses foreign and damaged folders, reads what is there."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from kvprune.comparison.data.safe_json import parse
from kvprune.comparison.storage.addresses import digest
from kvprune.comparison.storage.answer_lines import LineReader, StoredAnswer
from kvprune.comparison.storage.journal import Journal, check_plain_file, read_plain_file, remove, write_json
from kvprune.comparison.storage.recorded_grid import (
    PLACES,
    Earlier,
    RecordedGrid,
    read_about,
    read_earlier,
    read_grid,
)
from kvprune.errors import ResultsError

__all__ = [
    "COST_PLOT",
    "DATA",
    "FORMAT",
    "KIND",
    "MANIFEST",
    "PLOT",
    "RESULTS",
    "SUMMARY",
    "TEMPORARY",
    "TIMINGS",
    "ResultsFolder",
    "lock",
]

KIND, FORMAT = "kvprune comparison", 4

MANIFEST, RESULTS, TIMINGS = "manifest.json", "results.jsonl", "timings.jsonl"
SUMMARY, PLOT, COST_PLOT = "summary.json", "accuracy_vs_kept.png", "cost_vs_accuracy.png"

DATA = "data"
"""Folder inside the results folder that holds the demo's pictures and questions."""

TEMPORARY = ".kvprune-"
"""Prefix of temporary files. An interrupted run may leave some behind; they may be deleted."""

_WHY = {
    "1": ", since format 1 has no receipts of what was kept, so its answers cannot be verified",
    "2": ", since format 2 does not say how many tokens of a prompt were decoded after pruning",
    "3": ", since format 3 does not say with which ingredients each answer was computed, so nothing can be "
    "added to it",
}
"""Why old formats are no longer read."""

_REMEDY = "choose another --output, or delete this folder to start again"


class ResultsFolder:
    """A folder that holds a comparison; as a context manager, it keeps other processes out while it is open.

    Args:
        path: The folder; entering the context creates it if it is missing.

    Raises:
        ResultsError: If `path` is neither missing, nor an empty folder, nor a results folder, or if its
            manifest is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results = Journal(path / RESULTS)
        self.timings = Journal(path / TIMINGS)
        self._lock: int | None = None
        self.manifest = self._read_manifest()

    def __enter__(self) -> ResultsFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResultsError(f"cannot make the folder {self.path}: {error.strerror or error}") from error
        self._lock = lock(self.path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def grid(self) -> RecordedGrid | None:
        """The grid that the manifest records; None where there is no manifest.

        Raises:
            ResultsError: If the manifest is damaged.
        """
        return None if self.manifest is None else read_grid(self.path / MANIFEST, self.manifest["run"])

    @property
    def earlier(self) -> list[Earlier]:
        """What earlier grids had in place of what the grid has now, in order.

        Raises:
            ResultsError: If the manifest is damaged.
        """
        return [] if self.manifest is None else read_earlier(self.path / MANIFEST, self.manifest)

    @property
    def about(self) -> Mapping[str, str]:
        """Where model, guide and data are, and the partner, as the manifest records it.

        Raises:
            ResultsError: If the manifest is damaged.
        """
        return read_about(self.path / MANIFEST, self.manifest or {})

    def check(self) -> None:
        """Raise now, and not after hours of work, if the folder cannot be added to.

        Raises:
            ResultsError: If something other than a plain file is where a file belongs, or the manifest was
                changed after it was written.
        """
        for name in (MANIFEST, RESULTS, TIMINGS, SUMMARY, PLOT, COST_PLOT):
            check_plain_file(self.path / name)
        data = self.path / DATA
        if data.is_symlink() or (data.exists() and not data.is_dir()):
            raise ResultsError(f"{data} is not a folder; move it away, or {_REMEDY}")
        self.manifest = self._read_manifest()  # another process may have written it before we had the lock
        if self.manifest is not None and self.manifest.get("run_sha256") != digest(self.manifest["run"]):
            raise ResultsError(
                f"{self.path / MANIFEST} is damaged: its 'run' was changed after it was written "
                f"(run_sha256 {str(self.manifest.get('run_sha256'))[:70]!r}); restore it, or {_REMEDY}"
            )
        if self.manifest is not None:
            read_about(self.path / MANIFEST, self.manifest)

    @property
    def is_free(self) -> bool:
        """Whether the folder holds nothing that was computed; another comparison may then take it."""
        return not any(journal.path.exists() for journal in (self.results, self.timings))

    def record(self, grid: RecordedGrid, earlier: Sequence[Earlier], about: Mapping[str, Any]) -> None:
        """Write the manifest, unless it says all this already.

        The summary and the figure of another grid are deleted before; they are made again at the end.

        Args:
            grid: The grid.
            earlier: What earlier grids had, in order.
            about: What does not change an answer. Where model, guide and data are counts as a change; the
                machine does not.
        """
        old = self.manifest or {}
        today = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        new: dict[str, Any] = {
            "kind": KIND,
            "format": FORMAT,
            "created": old.get("created", today),
            "run": grid.to_json(),
            "run_sha256": digest(grid.to_json()),
            "about": dict(about),
            "earlier": [one.to_json() for one in earlier],
        }
        same_places = all(old.get("about", {}).get(name) == about[name] for name in PLACES)
        if same_places and all(old.get(name) == new[name] for name in ("run", "earlier")):
            return
        if old.get("run") != new["run"]:
            for name in (SUMMARY, PLOT, COST_PLOT):
                remove(self.path / name)
        self.manifest = new
        write_json(self.path / MANIFEST, new)

    def answers(self) -> list[StoredAnswer]:
        """Return all finished lines of the results; cuts an unfinished last line off the file.

        Raises:
            ResultsError: If a line is damaged.
        """
        found, finished = read_answers(self.results)
        self.results.cut(finished)
        return found

    def _read_manifest(self) -> dict[str, Any] | None:
        """Return the manifest, or None where there is nothing or an empty folder."""
        names = self._names()
        if names is None:
            return None
        path = self.path / MANIFEST
        raw = read_plain_file(path)
        if raw is None and names:
            raise ResultsError(
                f"{self.path} is not a results folder: it holds {names[0]!r} but no {MANIFEST}; "
                "choose an empty or new folder as --output"
            )
        return None if raw is None else _parse_manifest(path, raw)

    def _names(self) -> list[str] | None:
        """Return what is in the folder, temporary files left out; None where there is no folder."""
        try:
            if not self.path.exists():
                return None
            if not self.path.is_dir():
                raise ResultsError(f"{self.path} is a file; --output must name a folder")
            return sorted(one.name for one in self.path.iterdir() if not one.name.startswith(TEMPORARY))
        except OSError as error:
            raise ResultsError(f"{self.path} cannot be read: {error.strerror or error}") from error


def read_answers(journal: Journal) -> tuple[list[StoredAnswer], int]:
    """Return all finished lines of the results, and how many bytes they take.

    Raises:
        ResultsError: If the file cannot be read, or a line is damaged.
    """
    reader, found, finished = LineReader(), [], 0
    where = str(journal.path)
    for number, line in enumerate(journal.lines(), start=1):
        found.append(reader.read(where, number, line))
        finished += len(line) + 1
    return found, finished


def _parse_manifest(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        manifest = parse(raw)
    except ValueError as error:
        raise ResultsError(f"{path} is damaged ({error}); {_REMEDY}") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise ResultsError(f"{path} is not the manifest of a {KIND}; {_REMEDY}")
    if manifest.get("format") != FORMAT:
        found = str(manifest.get("format"))
        raise ResultsError(
            f"{path} has format {found[:20]}, but this kvprune reads {FORMAT}{_WHY.get(found, '')}; {_REMEDY}"
        )
    run = manifest.get("run")
    if not isinstance(run, dict):
        raise ResultsError(f"{path} is damaged: field 'run' is {str(run)[:60]}; {_REMEDY}")
    return manifest


def lock(folder: Path, *, shared: bool = False) -> int | None:
    """Lock a folder and return the file descriptor that holds the lock; the system drops it with the process.

    Args:
        folder: The folder to lock.
        shared: Lock for reading: keeps out processes that write, but not others that read.

    Returns:
        The file descriptor, to be closed to release the lock; None where the system has no such locks.

    Raises:
        ResultsError: If another process holds the lock, or the folder cannot be opened.
    """
    try:
        import fcntl
    except ImportError:
        return None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ResultsError(f"{folder} cannot be opened: {error.strerror or error}") from error
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ResultsError(
            f"{folder} is in use by another run of kvprune; wait for it, or choose another folder"
        ) from None
    except OSError:  # a file system without locks: other processes are not kept out
        pass
    return handle
