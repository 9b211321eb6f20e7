"""The table of a comparison: rows grouped by budget, in the given order or ranked by accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvprune.comparison.display.notes import LONGEST_TASK, times
from kvprune.comparison.statistics.rates import Rate
from kvprune.comparison.statistics.summary import Row, Summary
from kvprune.text import printable

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

__all__ = ["groups", "ranking", "table"]


def table(summary: Summary, width: int = 120, *, ranked: bool = False) -> Table:
    """Return the table, ready to print with rich.

    Args:
        summary: The results to show.
        width: Width of the terminal in characters; the columns of single tasks are left out where they do not
            fit.
        ranked: Order the rows of each keep ratio by accuracy, number them, and show their difference to
            `Summary.against`.
    """
    from rich.console import Console

    if len(summary.tasks) > 1:
        whole = _build(summary, summary.tasks, ranked)
        if Console(width=1000).measure(whole).maximum <= width:
            return whole
    return _build(summary, (), ranked)


def _build(summary: Summary, tasks: Sequence[str], ranked: bool) -> Table:
    from rich import box
    from rich.table import Table

    shown = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False, collapse_padding=ranked
    )
    if ranked:
        shown.add_column("#", justify="right", no_wrap=True)
    shown.add_column("policy", overflow="fold")
    shown.add_column("budget", no_wrap=True)
    versus = [f"- {summary.against} [95 %]"] if ranked else []
    memory = "MiB" if ranked else "MiB/stock"  # ranked tables have more columns; full holds what stock does
    names = [printable(task, LONGEST_TASK) for task in tasks]
    for heading in ("kept %", memory, "right % [95 %]", *versus, *names, "= full %"):
        shown.add_column(_plain(heading), justify="right", no_wrap=True)
    if summary.stock is not None:
        shown.add_column("prefill", justify="right", no_wrap=True)
        shown.add_column("token", justify="right", no_wrap=True)
    for group in groups(summary.rows):
        for row in ranking(group) if ranked else group:
            cells = _cells(row, tasks, summary.stock is not None)
            if ranked:
                held = _mebibytes(row.bytes_held)
                cells = [
                    _place(row, group),
                    *cells[:3],
                    held,
                    cells[4],
                    _difference(row, summary.against),
                    *cells[5:],
                ]
            shown.add_row(*map(_plain, cells))
        shown.add_section()
    return shown


def _plain(text: str) -> Text:
    """Return text that any console prints as it is: names of tasks are no markup and no :emoji:."""
    from rich.text import Text

    return Text(printable(text))


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Group rows by budget: none first, then each keep ratio, then other budgets by what they kept."""
    free = [row for row in rows if not row.budget]
    ratios = sorted({row.keep_ratio for row in rows if row.keep_ratio is not None}, reverse=True)
    by_ratio = [[row for row in rows if row.keep_ratio == ratio] for ratio in ratios]
    others = sorted((r for r in rows if r.budget and r.keep_ratio is None), key=lambda r: -r.kept_fraction)
    return [group for group in (free, *by_ratio, others) if group]


def ranking(group: Sequence[Row]) -> list[Row]:
    """Return rows of one keep ratio by accuracy, the best first; other groups stay as they are."""
    return list(group) if group[0].keep_ratio is None else sorted(group, key=lambda row: -row.accuracy.value)


def _cells(row: Row, tasks: Sequence[str], timed: bool) -> list[str]:
    cells = [
        row.label,
        _budget(row),
        f"{100 * row.kept_fraction:.1f}",
        f"{_mebibytes(row.bytes_held)}/{_mebibytes(row.bytes_full)}",
        _percent(row.accuracy),
        *(f"{100 * row.tasks[task].value:.1f}" for task in tasks),
        f"{100 * row.agreement.value:.1f}",
    ]
    if timed:
        speed = row.speed
        cells += [
            times(speed.prefill_ratio if speed else None),
            times(speed.token_ratio if speed else None),
        ]
    return cells


def _place(row: Row, group: Sequence[Row]) -> str:
    """Return a row's rank in its group; equal accuracies share one."""
    if row.keep_ratio is None:
        return ""
    return str(1 + sum(other.accuracy.value > row.accuracy.value for other in group))


def _difference(row: Row, against: str) -> str:
    found = row.versus_baseline
    if found is None:
        return "" if row.keep_ratio is None or row.label != against else "0"
    return f"{100 * found.value:+.1f} [{100 * found.low:+.0f}, {100 * found.high:+.0f}]"


def _budget(row: Row) -> str:
    if row.keep_ratio is not None:
        return f"{100 * row.keep_ratio:.4g} %"
    kind, _, value = row.budget.partition("=")
    return f"{value} tokens" if kind == "keep_tokens" else row.budget


def _percent(share: Rate) -> str:
    return f"{100 * share.value:.1f} [{100 * share.low:.0f}, {100 * share.high:.0f}]"


def _mebibytes(count: float) -> str:
    size = count / 2**20
    return f"{size:.3f}" if size < 1 else f"{size:.4g}"
