"""The sources of examples and weights: the user's files, or one of the demos."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from kvprune.comparison.data.examples import Example, Kind, Question, choose_tasks, read_examples
from kvprune.comparison.plan.settings import EMBEDDED_GUIDE, NO_GUIDE, Settings
from kvprune.comparison.storage.journal import write_atomically
from kvprune.comparison.storage.recorded_grid import RecordedGrid
from kvprune.comparison.storage.results_folder import DATA, TEMPORARY
from kvprune.errors import ResultsError, UnsupportedModelError

__all__ = [
    "DEFAULT_LIMIT",
    "check_demo_tasks",
    "data_file",
    "demo_folder",
    "guide_of",
    "guide_weights",
    "model_of",
    "speech_data",
    "weights",
    "write_demo",
]

DEFAULT_LIMIT = 32
"""How many of the demo's questions about pictures are asked per task, if no limit is given."""

_ROWS = "data.jsonl"


def model_of(settings: Settings, kind: Kind) -> str | None:
    """Return the model of a run: that of the settings, or of the demo; None is the embedded one."""
    if settings.model is not None or kind == "pictures":
        return settings.model
    from kvprune import demo

    return demo.SPEECH_MODEL


def guide_of(settings: Settings, kind: Kind, recorded: str) -> str:
    """Return the guide of a run: that of the settings or of its folder, or the embedded model's.

    Args:
        settings: The settings.
        kind: What the examples are.
        recorded: The guide that the results folder records.
    """
    if settings.guide is not None:
        return settings.guide
    if recorded != NO_GUIDE:
        return recorded
    return EMBEDDED_GUIDE if kind == "pictures" and settings.model is None else NO_GUIDE


def guide_weights(guide: str | None) -> str | None:
    """Return the hub id or folder to load a guide from, given `Settings.guide`; None where there is no guide.

    Raises:
        UnsupportedModelError: If the embedded guide is missing.
    """
    if guide != EMBEDDED_GUIDE:
        return None if guide == NO_GUIDE else guide
    from kvprune import demo

    if not demo.guide_path().is_dir():
        raise UnsupportedModelError(
            f"this kvprune comes without a guide: {demo.guide_path()} is missing; give a model with "
            "--guide FOLDER (Settings.guide)"
        )
    return str(demo.guide_path())


def check_demo_tasks(tasks: Sequence[str] | None) -> tuple[str, ...]:
    """Return the chosen tasks of the demo about pictures; None chooses all.

    Raises:
        DataError: If the demo has no such task.
    """
    from kvprune import demo

    return choose_tasks(tasks, demo.TASKS, "demo")


def speech_data() -> Path:
    """Return the file of recordings that comes with kvprune."""
    from kvprune import demo

    return demo.speech_data()


def demo_folder(folder: Path, seed: int) -> Path:
    """Return where the demo's pictures and questions belong in a results folder; each seed has its own."""
    return folder / (DATA if seed == 0 else f"{DATA}-seed-{seed}")


def data_file(folder: Path, grid: RecordedGrid, data: Path | None) -> Path:
    """Return the file that holds the examples of a grid.

    Args:
        folder: The results folder.
        grid: Its grid.
        data: The user's file, where the examples come from one.
    """
    if data is not None:
        return data
    if grid.origin == "speech":
        return speech_data()
    return demo_folder(folder, grid.data_seed or 0) / _ROWS


def write_demo(folder: Path, tasks: Sequence[str], limit: int, seed: int) -> tuple[Example, ...]:
    """Write the demo's questions into a results folder, beside those that are there, and read all of them.

    What was written before stays as it is. An interrupted write leaves nothing that could be mistaken for
    data: the folder appears all at once, and later its list of questions is replaced whole.

    Args:
        folder: Results folder, already locked.
        tasks: What `check_demo_tasks` returned.
        limit: Questions per task.
        seed: Seed of the pictures and questions.

    Returns:
        All questions in the folder, more than asked for where an earlier run asked more.

    Raises:
        ResultsError: If the files cannot be written, or hold questions of another version of the demo.
        DataError: If what was written before is damaged.
    """
    from kvprune import demo

    target = demo_folder(folder, seed)
    partial = folder / f"{TEMPORARY}{DATA}"
    found = read_examples(target / _ROWS) if target.exists() else ()
    _check_version(found, tasks, seed, target)
    counts = {task: sum(one.task == task for one in found) for task in tasks}
    if found and all(counts[task] >= limit for task in tasks):
        return found
    try:
        if partial.is_symlink() or partial.is_file():
            partial.unlink()
        shutil.rmtree(partial, ignore_errors=True)
        demo.write_dataset(partial, tasks=tuple(tasks), per_task=limit, seed=seed)
        if found:
            _add_rows(target, partial, {one.id for one in found})
            shutil.rmtree(partial)
        else:
            os.replace(partial, target)
    except OSError as error:
        raise ResultsError(f"cannot write the demo's data to {target}: {error.strerror or error}") from error
    return read_examples(target / _ROWS)


def _check_version(found: Sequence[Example], tasks: Sequence[str], seed: int, target: Path) -> None:
    """Raise unless the first question of each task is the one that the demo asks now.

    Another version of the demo draws other pictures, which the embedded model of now was not trained on.
    """
    from kvprune import demo

    for task in tasks:
        one = next((one for one in found if one.task == task), None)
        if not isinstance(one, Question):
            continue
        (now,) = demo.examples(task, 1, seed=seed)
        if (one.question, one.answers) != (now.question, now.answers):
            raise ResultsError(
                f"{target} holds questions of another version of the demo: {one.id} asks {one.question!r}, "
                f"and this kvprune asks {now.question!r}; give another --output (Settings.output)"
            )


def _add_rows(target: Path, more: Path, known: set[str]) -> None:
    """Move pictures and rows of one data set into another, except those that it has."""
    rows = (target / _ROWS).read_bytes()
    for line in (more / _ROWS).read_bytes().splitlines(keepends=True):
        row = json.loads(line)
        if row["id"] not in known:
            os.replace(more / row["image"], target / row["image"])
            rows += line
    write_atomically(target / _ROWS, rows)


def weights(model: str | None) -> str:
    """Return the hub id or folder to load a model from; None stands for the embedded demo."""
    if model is not None:
        return model
    from kvprune import demo

    return str(demo.model_path())
