"""Where a comparison's examples and weights come from: the user's files, or the embedded demo."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from kvprune.comparison.data.examples import Example, choose, read_examples
from kvprune.comparison.storage.results import DATA, TEMPORARY
from kvprune.errors import DataError, ResultsError
from kvprune.text import suggestion

__all__ = ["DEFAULT_LIMIT", "check_demo_tasks", "demo_examples", "own_examples", "weights"]

DEFAULT_LIMIT = 64
"""Examples per task of the demo."""


def own_examples(data: Path, tasks: Sequence[str] | None, limit: int | None) -> tuple[Example, ...]:
    """Read the user's file; see `read_examples` and `choose`."""
    return choose(read_examples(data), tasks, limit)


def check_demo_tasks(tasks: Sequence[str] | None) -> tuple[str, ...]:
    """Return the demo's tasks that are asked for.

    Raises:
        DataError: If the demo has no such task.
    """
    from kvprune import demo

    for task in tasks or ():
        if task not in demo.TASKS:
            raise DataError(
                f"unknown task {task!r}{suggestion(task, demo.TASKS)}; the demo has: {', '.join(demo.TASKS)}"
            )
    if tasks is not None and not tasks:
        raise DataError(f"no task chosen; the demo has: {', '.join(demo.TASKS)}")
    return tuple(task for task in demo.TASKS if tasks is None or task in tasks)


def demo_examples(folder: Path, tasks: Sequence[str], limit: int, seed: int) -> tuple[Example, ...]:
    """Write the demo's pictures and questions as files, once, and read them as a user's file is read.

    An interrupted write leaves nothing that is mistaken for data: the files appear under `DATA` all at once.

    Args:
        folder: Results folder, already claimed.
        tasks: What `check_demo_tasks` returned.
        limit: Examples per task.
        seed: Of the pictures and questions.

    Raises:
        ResultsError: If they cannot be written.
    """
    from kvprune import demo

    target = folder / DATA
    try:
        if not target.exists():
            partial = folder / f"{TEMPORARY}{DATA}"
            if partial.is_symlink() or partial.is_file():
                partial.unlink()
            shutil.rmtree(partial, ignore_errors=True)
            demo.write_dataset(partial, tasks=tuple(tasks), per_task=limit, seed=seed)
            os.replace(partial, target)
    except OSError as error:
        raise ResultsError(f"cannot write the demo's data to {target}: {error.strerror or error}") from error
    return read_examples(target / "data.jsonl")


def weights(model: str | None) -> str:
    """Return the hub id or folder of a model; None is the embedded demo."""
    if model is not None:
        return model
    from kvprune import demo

    return str(demo.model_path())
