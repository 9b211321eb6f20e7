"""Shows a comparison on the terminal: a progress bar while it runs, then the table and its notes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from kvprune.comparison.display.notes import notes
from kvprune.comparison.display.table import layout
from kvprune.comparison.plan.settings import Progress
from kvprune.comparison.statistics.summary import Summary
from kvprune.text import printable

__all__ = ["progress_bar", "show_summary"]


def show_summary(
    summary: Summary, output: Path, console: Console, *, ranked: bool = False, encoder: str | None = None
) -> None:
    """Print the table, its notes, and where the files are.

    Args:
        summary: The results to show.
        output: The results folder.
        console: The console to print to.
        ranked: Whether rows of one budget are ordered by the metric; see `table`.
        encoder: What was reused of the encoder's work, in a sentence; None if that is not known.
    """
    fitting = layout(summary, console.width, ranked=ranked)
    console.print(fitting.table)
    console.print()
    for note in [*fitting.notes(), *notes(summary, ranked=ranked, encoder=encoder)]:
        console.print(Text(note))  # no markup and no :emoji:, whatever a task is called
    files = "results.jsonl, summary.json, manifest.json and the figures"
    console.print(Text(f"Everything is in {printable(str(output))}: {files}."), soft_wrap=True)


@contextmanager
def progress_bar() -> Iterator[Callable[[Progress], None]]:
    """Show progress and the time left on standard error; what an earlier run finished counts as done.

    Yields:
        The function to call with each `Progress`.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    bar = Bar(*columns, console=Console(stderr=True))
    task = bar.add_task("", start=False)

    def on_progress(progress: Progress) -> None:
        bar.start()
        bar.start_task(task)
        bar.update(task, description=progress.phase, completed=progress.done, total=progress.total)

    try:
        yield on_progress
    finally:
        bar.stop()
