"""The sources of examples and weights: the user's files, or the embedded demo."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from kvprune.comparison.data.examples import Example, choose, choose_tasks, read_examples
from kvprune.comparison.storage.results_folder import DATA, TEMPORARY
from kvprune.errors import ResultsError

__all__ = ["DEFAULT_LIMIT", "check_demo_tasks", "demo_examples", "own_examples", "weights"]

DEFAULT_LIMIT = 64
"""How many of the demo's examples are asked per task, if no limit is given."""


def own_examples(data: Path, tasks: Sequence[str] | None, limit: int | None) -> tuple[Example, ...]:
    """Read the user's file and choose from it; see `read_examples` and `choose`."""
    return choose(read_examples(data), tasks, limit)


def check_demo_tasks(tasks: Sequence[str] | None) -> tuple[str, ...]:
    """Return the chosen tasks of the demo; None chooses all.

    Raises:
        DataError: If the demo has no such task.
    """
    from kvprune import demo

    return choose_tasks(tasks, demo.TASKS, "demo")


def demo_examples(folder: Path, tasks: Sequence[str], limit: int, seed: int) -> tuple[Example, ...]:
    """Write the demo's pictures and questions into a results folder, and read them as a user's file is read.

    They are written once. An interrupted write leaves nothing that could be mistaken for data, since the
    folder `DATA` appears all at once.

    Args:
        folder: Results folder, already claimed.
        tasks: What `check_demo_tasks` returned.
        limit: Examples per task.
        seed: Seed of the pictures and questions.

    Raises:
        ResultsError: If the files cannot be written.
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
    """Return the hub id or folder to load a model from; None stands for the embedded demo."""
    if model is not None:
        return model
    from kvprune import demo

    return str(demo.model_path())
