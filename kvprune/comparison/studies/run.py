"""Runs a study: one comparison after the other, and the table after each."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

from kvprune.comparison.execution.comparison import compare
from kvprune.comparison.plan.settings import Progress
from kvprune.comparison.storage.journal import write_atomically, write_json
from kvprune.comparison.storage.sources import DEFAULT_LIMIT, write_demo
from kvprune.comparison.studies.plan import Part, Plan
from kvprune.comparison.studies.study_table import StudyTable
from kvprune.errors import ResultsError

__all__ = ["CSV", "JSON", "MARKDOWN", "run_study"]

JSON, MARKDOWN, CSV = "study.json", "table.md", "table.csv"
"""Files of the table, beside the results folders of the data sets."""


def run_study(
    plan: Plan,
    on_progress: Callable[[Progress], None] = lambda _: None,
    on_note: Callable[[str], None] = lambda _: None,
) -> StudyTable:
    """Run the comparison of each data set into a results folder of its own, and write the table.

    The same call resumes an interrupted study: what is finished is only summarised again, without loading the
    model. The table is written after each data set, and says which ones are not finished.

    Args:
        plan: What `plan_study` returned.
        on_progress: Called as by `compare`; the phase begins with the title of the data set.
        on_note: Called as by `compare`; each note begins with the title of the data set.

    Returns:
        The table with all data sets of the plan.

    Raises:
        KVPruneError: As `compare`.
    """
    try:
        plan.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultsError(f"cannot make the folder {plan.output}: {error.strerror or error}") from error
    for part in plan.parts:  # before anything runs: data that lies there may be damaged
        _write_demo(part)
    table = StudyTable(plan=plan, summaries=())
    for part in plan.parts:
        title = part.data.title

        def report(progress: Progress, title: str = title) -> None:
            on_progress(replace(progress, phase=f"{title}: {progress.phase}"))

        def note(text: str, title: str = title) -> None:
            on_note(f"{title}: {text}")

        summary = compare(plan.study.policies, plan.study.keep_ratios, part.settings, report, note)
        gc.collect()  # the model of this data set must be gone before the next one loads its own
        table = StudyTable(plan=plan, summaries=(*table.summaries, summary))
        _write(table)
    return table


def _write_demo(part: Part) -> None:
    if part.demo_folder is not None and part.data.demo_task is not None:
        write_demo(part.demo_folder, (part.data.demo_task,), part.settings.limit or DEFAULT_LIMIT, 0)


def _write(table: StudyTable) -> None:
    folder = table.plan.output
    write_json(folder / JSON, table.to_dict())
    write_atomically(folder / MARKDOWN, table.markdown().encode("utf-8", "backslashreplace"))
    write_atomically(folder / CSV, table.csv().encode("utf-8", "backslashreplace"))
