"""A results folder: claims it for one run, refuses foreign or damaged ones, knows what is already done."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from kvprune.comparison.data.safe_json import parse
from kvprune.comparison.storage.answers import Answer, from_row
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
"""Prefix of files that an interrupted run may leave behind and that may be deleted."""

_WHY = {
    "1": ", since format 1 has no receipts of what was kept, so its answers cannot be verified",
    "2": ", since format 2 does not say how many tokens of a prompt were decoded after pruning",
}
"""Why an old format is not read any more."""

_REMEDY = "choose another --output, or delete this folder to start again"


class ResultsFolder:
    """A folder that holds one run; a context manager that keeps other processes out while it is open.

    Args:
        path: The folder; made when `claim` is called.

    Raises:
        ResultsError: If there is something at `path` that is neither an empty folder nor a results folder, or
            its manifest is damaged.
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

        A folder whose run has finished nothing yet is free to be claimed by another run.

        Raises:
            ResultsError: If the folder holds another run (the message names the first difference), or
                something else stands where a file of the run belongs.
        """
        new = json.loads(json.dumps(manifest))
        self._check_places()
        old = self._read_manifest()
        difference = None if old is None else refusal(_planned(old), new["run"])
        if old is not None and difference is None:
            if old.get("run_sha256") != digest(old["run"]):
                raise ResultsError(
                    f"{self.path / MANIFEST} is damaged: its 'run' is not what was written there "
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
        """Note a digest in the manifest once it is known, or check it against the one noted there.

        Raises:
            ResultsError: If another value is noted: what the finished part of the run used has changed.
        """
        assert self.manifest is not None, "claim comes first"
        pinned = self.manifest["run"].setdefault("pinned", {})
        if name not in pinned:
            pinned[name] = value
            self._write_manifest()
        elif pinned[name] != value:
            raise ResultsError(
                f"{self.path} holds another run: {name} was {pinned[name]!r} and is now {value!r}. "
                f"Results of different runs do not mix; {_REMEDY}"
            )

    def answers(self, specs: Sequence[str], ids: Sequence[str]) -> dict[tuple[str, str], Answer]:
        """Return finished answers by spec and example id, cutting an unfinished last line.

        Raises:
            ResultsError: If a line is damaged, repeated, or not part of this run.
        """
        return index_answers(self.results.path, self.results.recover(), specs, ids)

    def _check_places(self) -> None:
        """Find out now, not after hours of work, that a file cannot be written where it belongs."""
        for name in (MANIFEST, RESULTS, TIMINGS, SUMMARY, PLOT):
            check_plain_file(self.path / name)
        data = self.path / DATA
        if data.is_symlink() or (data.exists() and not data.is_dir()):
            raise ResultsError(f"{data} is no folder; move it away, or {_REMEDY}")

    def _write_manifest(self) -> None:
        assert self.manifest is not None, "there is one to write"
        self.manifest["run_sha256"] = digest(self.manifest["run"])
        write_json(self.path / MANIFEST, self.manifest)

    def _read_manifest(self) -> dict[str, Any] | None:
        try:
            if not self.path.exists():
                return None
            if not self.path.is_dir():
                raise ResultsError(f"{self.path} is a file; --output must name a folder")
            names = sorted(one.name for one in self.path.iterdir() if not one.name.startswith(TEMPORARY))
        except OSError as error:
            raise ResultsError(f"{self.path} cannot be read: {error.strerror or error}") from error
        raw = read_plain_file(self.path / MANIFEST)
        if raw is None:
            if names:
                raise ResultsError(
                    f"{self.path} is no results folder: it holds {names[0]!r} but no {MANIFEST}; "
                    "choose an empty or new folder as --output"
                )
            return None
        try:
            manifest = parse(raw)
        except ValueError as error:
            raise ResultsError(f"{self.path / MANIFEST} is damaged ({error}); {_REMEDY}") from error
        if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
            raise ResultsError(f"{self.path / MANIFEST} is not the manifest of a {KIND}; {_REMEDY}")
        if manifest.get("format") != FORMAT:
            raise ResultsError(
                f"{self.path / MANIFEST} has format {str(manifest.get('format'))[:20]}, "
                f"but this kvprune reads {FORMAT}{_WHY.get(str(manifest.get('format')), '')}; {_REMEDY}"
            )
        run = manifest.get("run")
        for name, value in (
            ("run", run),
            ("run.pinned", run.get("pinned", {}) if isinstance(run, dict) else {}),
        ):
            if not isinstance(value, dict):
                raise ResultsError(
                    f"{self.path / MANIFEST} is damaged: field {name!r} is {str(value)[:60]}; {_REMEDY}"
                )
        return manifest


def index_answers(
    path: Path, rows: Sequence[Mapping[str, Any]], specs: Sequence[str], ids: Sequence[str]
) -> dict[tuple[str, str], Answer]:
    """Return answers by spec and example id.

    Args:
        path: Of results.jsonl, for messages.
        rows: Its finished lines.
        specs: Configurations of the run.
        ids: Examples of the run.

    Raises:
        ResultsError: If a line is damaged, repeated, or not part of the run.
    """
    done: dict[tuple[str, str], Answer] = {}
    known_specs, known_ids = set(specs), set(ids)
    for number, row in enumerate(rows, start=1):
        answer = from_row(f"{path}, line {number}", row)
        key = (answer.spec, answer.id)
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
    """What was known of a run before it read its data."""
    return {name: value for name, value in manifest["run"].items() if name != "pinned"}


def lock(folder: Path, *, shared: bool = False) -> int | None:
    """Hold a lock that the system drops when the process ends; None where there are no such locks.

    Args:
        folder: What to lock.
        shared: For reading: keeps out those who write, but not others who read.

    Raises:
        ResultsError: If another process holds it, or the folder cannot be opened.
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
    except OSError:  # a file system without locks: nothing keeps others out, and nothing breaks
        pass
    return handle
