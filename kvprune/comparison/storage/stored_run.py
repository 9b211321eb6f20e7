"""A comparison as its results folder holds it, read without changing the folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvprune.comparison.data.examples import Example, read_examples
from kvprune.comparison.plan.grid import Configuration, exactly
from kvprune.comparison.plan.settings import Settings
from kvprune.comparison.storage.answer_lines import current
from kvprune.comparison.storage.answers import Answer, Key
from kvprune.comparison.storage.journal import Journal, read_plain_file
from kvprune.comparison.storage.recorded_grid import Batch, RecordedGrid
from kvprune.comparison.storage.recorded_settings import recorded_settings
from kvprune.comparison.storage.results_folder import SUMMARY, ResultsFolder, lock, read_answers
from kvprune.comparison.storage.sources import data_file
from kvprune.comparison.storage.timings import Laps, read_timings
from kvprune.errors import DataError, ResultsError
from kvprune.text import shown

__all__ = ["StoredRun", "choose_examples", "read_run"]


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """A comparison as its results folder holds it.

    Attributes:
        folder: the results folder.
        manifest: content of manifest.json.
        grid: the grid in it: ingredients, seeds and batches.
        settings: settings of the comparison; its batch size is that of the largest batch.
        configurations: configurations of the grid, the full cache first.
        examples: examples of the grid, read from its data now.
        answers: finished answers of the grid, by spec, seed and example id.
        old: number of other answers in the folder, by why they are not part of the grid.
        laps: measured times by repetition, in file order, and by spec; repetitions may time different
            configurations.
        summary: content of summary.json; None where there is no such file.
        notes: things worth knowing that are not errors.
    """

    folder: Path
    manifest: Mapping[str, Any]
    grid: RecordedGrid
    settings: Settings
    configurations: tuple[Configuration, ...]
    examples: tuple[Example, ...]
    answers: Mapping[Key, Answer]
    old: Mapping[str, int]
    laps: Mapping[int, Laps]
    summary: bytes | None
    notes: tuple[str, ...]

    @property
    def batches(self) -> tuple[Batch, ...]:
        """Ids of the examples of each call of `generate`, in order."""
        return self.grid.batches

    @property
    def missing(self) -> int:
        """How many answers are missing, as far as is known which policies draw."""
        drawing = {spec for spec, seed, _ in self.answers if seed is not None}
        seeds, answers = self.grid.seeds, self.answers
        return sum(
            sum((spec, seed, name) not in answers for seed in seeds) if spec in drawing else 1
            for spec in self.grid.specs
            for name in self.grid.digests
            if (spec, None, name) not in answers
        )


def read_run(folder: Path) -> StoredRun:
    """Read a results folder without changing it; an unfinished last line stays.

    Raises:
        ResultsError: If it is not a results folder, is damaged, or a run is working in it.
        DataError: If the data of the run are missing or damaged.
        KVPruneError: If a policy of the run is not installed, or a setting is out of range.
    """
    opened = ResultsFolder(folder)
    grid = opened.grid
    if opened.manifest is None or grid is None:
        raise ResultsError(f"there are no results at {folder}; expected a folder that kvprune compare wrote")
    settings = recorded_settings(folder, opened.manifest, grid)
    configurations = exactly(grid.specs)
    examples = choose_examples(read_examples(data_file(folder, grid, settings.data)), tuple(grid.digests))
    addresses = grid.addresses()
    handle = lock(folder, shared=True)
    try:
        lines, size = read_answers(opened.results)
        notes = [*_unfinished(opened.results, size)]
        answers, old = current(str(opened.results.path), lines, grid, opened.earlier)
        del lines
        rows, size = opened.timings.read()
        notes += _unfinished(opened.timings, size)
        timings = read_timings(str(opened.timings.path), rows, addresses, grid.digests)
        summary = read_plain_file(folder / SUMMARY)
    finally:
        if handle is not None:
            os.close(handle)
    return StoredRun(
        folder=folder,
        manifest=opened.manifest,
        grid=grid,
        settings=settings,
        configurations=configurations,
        examples=examples,
        answers=answers,
        old=old,
        laps=timings.laps,
        summary=summary,
        notes=tuple(notes),
    )


def choose_examples(examples: Sequence[Example], ids: Sequence[str]) -> tuple[Example, ...]:
    """Return the examples with these ids, in the order of the ids.

    Raises:
        DataError: If there is no such example.
    """
    by_id = {one.id: one for one in examples}
    for name in ids:
        if name not in by_id:
            raise DataError(
                f"example {shown(name, 80)}, which this comparison asked, is no longer in the data; restore "
                "it, or run kvprune compare again to go on without it"
            )
    return tuple(by_id[name] for name in ids)


def _unfinished(journal: Journal, finished: int) -> Iterator[str]:
    if journal.path.exists() and journal.path.stat().st_size != finished:
        yield f"{journal.path.name} ends in an unfinished line, which the next compare computes again"
