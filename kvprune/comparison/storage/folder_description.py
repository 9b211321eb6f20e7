"""What a results folder holds, at a glance: without its policies, its data or a model."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from kvprune.comparison.storage.addresses import UNIT_DIGITS
from kvprune.comparison.storage.recorded_grid import RecordedGrid, read_about
from kvprune.comparison.storage.results_folder import MANIFEST, SUMMARY, ResultsFolder
from kvprune.errors import ResultsError

__all__ = ["FolderDescription", "describe_folder"]

_UNIT = re.compile(rb'\{"unit": "([0-9a-f]{%d})"' % UNIT_DIGITS)


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderDescription:
    """What a results folder holds.

    Attributes:
        folder: the results folder.
        created: date and time when the folder was made, in ISO format.
        kind: what the examples are: "pictures" or "speech".
        model: where the model is: a hub id, a folder, or the embedded demo.
        data: where the examples are: a file, or the embedded demo.
        specs: specs of the configurations, the full cache first.
        seeds: seeds of policies that draw.
        examples: number of examples.
        answers: finished answers of the present comparison.
        missing: answers that are missing, as far as is known which policies draw.
        old: answers that were computed with other ingredients, and are not part of the comparison.
        summarised: whether the folder has a summary.
    """

    folder: Path
    created: str
    kind: str
    model: str
    data: str
    specs: tuple[str, ...]
    seeds: tuple[int, ...]
    examples: int
    answers: int
    missing: int
    old: int
    summarised: bool

    @property
    def finished(self) -> float:
        """Fraction of the answers that are there, 0..1."""
        whole = self.answers + self.missing
        return self.answers / whole if whole else 0.0


def describe_folder(folder: str | Path) -> FolderDescription:
    """Describe a results folder quickly; it is not changed, and its lines are counted but not checked.

    A comparison may be running in it.

    Raises:
        ResultsError: If it is not a results folder, or its manifest is damaged.
    """
    opened = ResultsFolder(Path(folder))
    grid = opened.grid
    if opened.manifest is None or grid is None:
        raise ResultsError(f"there are no results at {folder}; expected a folder that kvprune compare wrote")
    about = read_about(Path(folder) / MANIFEST, opened.manifest)
    units = Counter(found[1].decode() for line in opened.results.lines() if (found := _UNIT.match(line)))
    answers, missing, old = _count(grid, units)
    return FolderDescription(
        folder=Path(folder),
        created=opened.manifest["created"],
        kind=grid.context["kind"],
        model=about["model"],
        data=about["data"],
        specs=tuple(grid.specs),
        seeds=grid.seeds,
        examples=len(grid.digests),
        answers=answers,
        missing=missing,
        old=old,
        summarised=(Path(folder) / SUMMARY).is_file(),
    )


def _count(grid: RecordedGrid, units: Counter[str]) -> tuple[int, int, int]:
    """Return the number of answers that are there, that are missing, and that are old.

    Args:
        grid: The grid.
        units: How many lines there are of each unit, by its address.
    """
    addresses = grid.addresses()
    own: Counter[tuple[str, int | None, str]] = Counter()
    for address, count in units.items():
        unit = addresses.find(address)
        if unit is not None:
            own[unit.spec, unit.seed, unit.ids[0]] = count
    drawing = {spec for spec, seed, _ in own if seed is not None}
    missing = 0
    for spec in grid.specs:
        for batch in grid.batches:
            undrawn = own[spec, None, batch[0]]
            seeds = grid.seeds if spec in drawing and not undrawn else ()
            there = sum(own[spec, seed, batch[0]] for seed in seeds) + undrawn
            missing += max(0, len(batch) * max(1, len(seeds)) - there)
    answers = sum(own.values())
    return answers, missing, sum(units.values()) - answers
