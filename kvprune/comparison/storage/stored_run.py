"""A run as its results folder holds it, read without changing the folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvprune.comparison.data.examples import Example, choose, digest, read_examples
from kvprune.comparison.plan.grid import Configuration, exactly
from kvprune.comparison.plan.settings import Settings
from kvprune.comparison.storage.answers import Answer, Key
from kvprune.comparison.storage.journal import Journal, read_plain_file
from kvprune.comparison.storage.recorded_settings import recorded_settings, recorded_specs
from kvprune.comparison.storage.results_folder import (
    DATA,
    RESULTS,
    SUMMARY,
    TIMINGS,
    ResultsFolder,
    index_answers,
    lock,
)
from kvprune.comparison.storage.timings import Lap, read_laps
from kvprune.errors import ResultsError

__all__ = ["StoredRun", "read_run"]


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """A run as its results folder holds it.

    Attributes:
        folder: the results folder.
        manifest: content of manifest.json.
        settings: settings of the run.
        configurations: configurations of the run, the full cache first.
        examples: examples that the run asked, read from its data now.
        data_sha256: digest of these examples.
        answers: finished answers, by spec, seed and example id.
        laps: measured times by repetition, in file order, and by spec.
        summary: content of summary.json; None where there is no such file.
        notes: things worth knowing that are not errors.
    """

    folder: Path
    manifest: Mapping[str, Any]
    settings: Settings
    configurations: tuple[Configuration, ...]
    examples: tuple[Example, ...]
    data_sha256: str
    answers: Mapping[Key, Answer]
    laps: Mapping[int, Mapping[str | None, Lap]]
    summary: bytes | None
    notes: tuple[str, ...]


def read_run(folder: Path) -> StoredRun:
    """Read a results folder without changing it; an unfinished last line stays.

    Raises:
        ResultsError: If it is not a results folder, is damaged, or a run is working in it.
        DataError: If the data of the run are missing or damaged.
        KVPruneError: If a policy of the run is not installed, or a setting is out of range.
    """
    opened = ResultsFolder(folder)
    if opened.manifest is None:
        raise ResultsError(f"there are no results at {folder}; expected a folder that kvprune compare wrote")
    manifest, results, timings = opened.manifest, Journal(folder / RESULTS), Journal(folder / TIMINGS)
    settings = recorded_settings(folder, manifest)
    configurations = exactly(recorded_specs(folder, manifest))
    specs = [one.spec for one in configurations]
    data = folder / DATA / "data.jsonl" if settings.data is None else settings.data
    examples = choose(read_examples(data), settings.tasks, settings.limit)
    handle = lock(folder, shared=True)
    try:
        rows, size = results.read()
        notes = _unfinished(results, size)
        answers = index_answers(results.path, rows, specs, [example.id for example in examples])
        rows, size = timings.read()
        notes += _unfinished(timings, size)
        laps = read_laps(str(timings.path), rows, specs)
        summary = read_plain_file(folder / SUMMARY)
    finally:
        if handle is not None:
            os.close(handle)
    return StoredRun(
        folder=folder,
        manifest=manifest,
        settings=settings,
        configurations=configurations,
        examples=examples,
        data_sha256=digest(examples),
        answers=answers,
        laps=laps,
        summary=summary,
        notes=tuple(notes),
    )


def _unfinished(journal: Journal, finished: int) -> list[str]:
    if not journal.path.exists() or journal.path.stat().st_size == finished:
        return []
    return [f"{journal.path.name} ends in an unfinished line, which the next compare computes again"]
