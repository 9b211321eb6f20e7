"""A results folder: claims it for one run, refuses foreign and damaged ones, reads what is already done."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from kvprune.comparison.data.safe_json import parse
from kvprune.comparison.storage.answers import Answer, Key, from_row
from kvprune.comparison.storage.journal import Journal, check_plain_file, read_plain_file, write_json
from kvprune.comparison.storage.manifest import FORMAT, KIND, digest, refusal
from kvprune.errors import ResultsError

__all__ = [
    "DATA",
    "MANIFEST",
    "PLOT",
    "RESULTS",
    "SUMMARY",
    "TEMPORARY",
    "TIMINGS",
    "ResultsFolder",
    "index_answers",
    "lock",
]

MANIFEST, RESULTS, TIMINGS = "manifest.json", "results.jsonl", "timings.jsonl"
SUMMARY, PLOT = "summary.json", "accuracy_vs_kept.png"

DATA = "data"
"""Folder inside the results folder that holds the demo's pictures and questions."""

TEMPORARY = ".kvprune-"
"""Prefix of temporary files. An interrupted run may leave some behind; they may be deleted."""

_WHY = {
    "1": ", since format 1 has no receipts of what was kept, so its answers cannot be verified",
    "2": ", since format 2 does not say how many tokens of a prompt were decoded after pruning",
}
"""Why old formats are no longer read."""

_REMEDY = "choose another --output, or delete this folder to start again"


class ResultsFolder:
    """A folder that holds one run; as a context manager, it keeps other processes out while it is open.

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

    def claim(self, manifest: Mapping[str, Any]) -> None:
        """Make this the folder of the run that `manifest` describes, or resume that run.

        A folder whose run has not finished anything yet may be claimed by another run.

        Raises:
            ResultsError: If the folder holds another run (the message names a difference), or something other
                than a plain file is where a file of the run belongs.
        """
        new = json.loads(json.dumps(manifest))
        self._check_places()
        old = self._read_manifest()
        difference = None if old is None else refusal(_planned(old), new["run"])
        if old is not None and difference is None:
            if old.get("run_sha256") != digest(old["run"]):
                raise ResultsError(
                    f"{self.path / MANIFEST} is damaged: its 'run' was changed after it was written "
                    f"(run_sha256 {str(old.get('run_sha256'))[:70]!r}); restore it, or {_REMEDY}"
                )
            self.manifest = old
            return
        if old is not None and any(journal.path.exists() for journal in (self.results, self.timings)):
            raise ResultsError(
                f"{self.path} holds another run: {difference}. "
                f"Results of different runs do not mix; {_REMEDY}"
            )
        if old is not None:
            shutil.rmtree(self.path / DATA, ignore_errors=True)
        self.manifest = new
        self._write_manifest()

    def pin(self, name: str, value: str) -> None:
        """Record a digest in the manifest as soon as it is known, or compare it with the recorded one.

        Raises:
            ResultsError: If another value is recorded: what the finished part of the run used has changed.
        """
        assert self.manifest is not None, "call claim first"
        pinned = self.manifest["run"].setdefault("pinned", {})
        if name not in pinned:
            pinned[name] = value
            self._write_manifest()
        elif pinned[name] != value:
            raise ResultsError(
                f"{self.path} holds another run: {name} was {pinned[name]!r} and is now {value!r}. "
                f"Results of different runs do not mix; {_REMEDY}"
            )

    def answers(self, specs: Sequence[str], ids: Sequence[str]) -> dict[Key, Answer]:
        """Return finished answers by spec, seed and example id; cuts an unfinished last line off the file.

        Raises:
            ResultsError: If a line is damaged, repeated, or not part of this run.
        """
        return index_answers(self.results.path, self.results.recover(), specs, ids)

    def _check_places(self) -> None:
        """Raise now, and not after hours of work, if a file cannot be written where it belongs."""
        for name in (MANIFEST, RESULTS, TIMINGS, SUMMARY, PLOT):
            check_plain_file(self.path / name)
        data = self.path / DATA
        if data.is_symlink() or (data.exists() and not data.is_dir()):
            raise ResultsError(f"{data} is not a folder; move it away, or {_REMEDY}")

    def _write_manifest(self) -> None:
        assert self.manifest is not None, "no manifest to write"
        self.manifest["run_sha256"] = digest(self.manifest["run"])
        write_json(self.path / MANIFEST, self.manifest)

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
    pinned = run.get("pinned", {}) if isinstance(run, dict) else {}
    for name, value in (("run", run), ("run.pinned", pinned)):
        if not isinstance(value, dict):
            raise ResultsError(f"{path} is damaged: field {name!r} is {str(value)[:60]}; {_REMEDY}")
    return manifest


def index_answers(
    path: Path, rows: Sequence[Mapping[str, Any]], specs: Sequence[str], ids: Sequence[str]
) -> dict[Key, Answer]:
    """Return answers by spec, seed and example id.

    Args:
        path: Path of results.jsonl, for messages.
        rows: The finished lines of that file.
        specs: Specs of the run's configurations.
        ids: Ids of the run's examples.

    Raises:
        ResultsError: If a line is damaged, repeated, or not part of the run.
    """
    done: dict[Key, Answer] = {}
    known_specs, known_ids = set(specs), set(ids)
    for number, row in enumerate(rows, start=1):
        answer = from_row(f"{path}, line {number}", row)
        key = answer.key
        if answer.spec not in known_specs or answer.id not in known_ids:
            raise ResultsError(
                f"{path}, line {number}: spec {answer.spec!r} with example {answer.id!r} "
                f"is not part of this run; {_REMEDY}"
            )
        if key in done:
            raise ResultsError(
                f"{path}, line {number}: spec {answer.spec!r} with example {answer.id!r} "
                "appears twice; delete one of the two lines"
            )
        done[key] = answer
    return done


def _planned(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return what stands under "run" without what was recorded while the run was going on."""
    return {name: value for name, value in manifest["run"].items() if name != "pinned"}


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
