"""A results folder: claims it for one run, refuses foreign or damaged ones, knows what is already done."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from kvprune.ablation.answers import Answer, from_row
from kvprune.ablation.journal import Journal, write_json
from kvprune.ablation.manifest import FORMAT, KIND, first_difference
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
]

MANIFEST, RESULTS, TIMINGS = "manifest.json", "results.jsonl", "timings.jsonl"
SUMMARY, PLOT = "summary.json", "accuracy_vs_kept.png"

DATA = "data"
"""Folder inside the results folder that holds the demo's pictures and questions."""

TEMPORARY = ".kvprune-"
"""Prefix of files that an interrupted run may leave behind and that may be deleted."""

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
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.path)
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
            ResultsError: If the folder holds another run; the message names the first difference.
        """
        new = json.loads(json.dumps(manifest))
        old = self._read_manifest()
        difference = None if old is None else first_difference(_planned(old), new["run"])
        if old is not None and difference is None:
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
        write_json(self.path / MANIFEST, new)

    def pin(self, name: str, value: str) -> None:
        """Note a digest in the manifest once it is known, or check it against the one noted there.

        Raises:
            ResultsError: If another value is noted: what the finished part of the run used has changed.
        """
        assert self.manifest is not None, "claim comes first"
        pinned = self.manifest["run"].setdefault("pinned", {})
        if name not in pinned:
            pinned[name] = value
            write_json(self.path / MANIFEST, self.manifest)
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
        done: dict[tuple[str, str], Answer] = {}
        known_specs, known_ids = set(specs), set(ids)
        for number, row in enumerate(self.results.recover(), start=1):
            answer = from_row(f"{self.results.path}, line {number}", row)
            key = (answer.spec, answer.id)
            if answer.spec not in known_specs or answer.id not in known_ids:
                raise ResultsError(
                    f"{self.results.path}, line {number}: spec {answer.spec!r} with example {answer.id!r} "
                    f"is not part of this run; {_REMEDY}"
                )
            if key in done:
                raise ResultsError(
                    f"{self.results.path}, line {number}: spec {answer.spec!r} with example {answer.id!r} "
                    "appears twice; delete one of the two lines"
                )
            done[key] = answer
        return done

    def _read_manifest(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        if not self.path.is_dir():
            raise ResultsError(f"{self.path} is a file; --output must name a folder")
        try:
            text = (self.path / MANIFEST).read_text(encoding="utf-8")
        except FileNotFoundError:
            foreign = sorted(p.name for p in self.path.iterdir() if not p.name.startswith(TEMPORARY))
            if foreign:
                raise ResultsError(
                    f"{self.path} is no results folder: it holds {foreign[0]!r} but no {MANIFEST}; "
                    "choose an empty or new folder as --output"
                ) from None
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise ResultsError(f"{self.path / MANIFEST} cannot be read ({error}); {_REMEDY}") from error
        try:
            manifest = json.loads(text)
        except ValueError as error:
            raise ResultsError(f"{self.path / MANIFEST} is damaged ({error}); {_REMEDY}") from error
        if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
            raise ResultsError(f"{self.path / MANIFEST} is not the manifest of a {KIND}; {_REMEDY}")
        if manifest.get("format") != FORMAT:
            raise ResultsError(
                f"{self.path / MANIFEST} has format {manifest.get('format')!r}, "
                f"but this kvprune reads {FORMAT}; {_REMEDY}"
            )
        if not isinstance(manifest.get("run"), dict):
            raise ResultsError(
                f"{self.path / MANIFEST} is damaged: field 'run' is {manifest.get('run')!r}; {_REMEDY}"
            )
        return manifest


def _planned(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What was known of a run before it read its data."""
    return {name: value for name, value in manifest["run"].items() if name != "pinned"}


def _lock(folder: Path) -> int | None:
    """Hold a lock that the system drops when the process ends; None where there are no such locks."""
    try:
        import fcntl
    except ImportError:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ResultsError(
            f"{folder} is in use by another run of kvprune; wait for it, or choose another --output"
        ) from None
    except OSError:  # a file system without locks: nothing keeps others out, and nothing breaks
        pass
    return handle
