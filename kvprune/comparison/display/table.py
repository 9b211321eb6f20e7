"""The table of a comparison: rows grouped by budget, in the given order or ranked by the metric."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvprune.comparison.display.cells import Column, columns
from kvprune.comparison.display.naming import budget
from kvprune.comparison.plan.grid import ANSWER_ATTENTION
from kvprune.comparison.statistics.summary import Row, Summary
from kvprune.text import printable

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

__all__ = ["Layout", "groups", "layout", "ranking", "table"]

_DROPPED_FIRST = (
    "stock",
    "tasks",
    "window",
    "times",
    "= full %",
    ANSWER_ATTENTION,
    "CER",
    "MiB",
    "capped",
    "loops",
    "intervals",
)
"""Columns that are left out on narrow terminals, what matters least first.

Policy, budget, kept, metric and difference always stay; "intervals" drops the intervals beside the last two,
"stock" the memory of stock transformers, which is that of ``full``, and "window" the length of the encoder's
window beside the budget, which the notes say.
"""

_SHORTEST_NAME = 18
"""Names of policies are not shortened below this width, in characters of the terminal."""

_WIDEST = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A table that fits a terminal.

    Attributes:
        table: the table, ready to print with rich.
        left_out: what the terminal was too narrow for, in words.
        shortened: whether names of policies were cut.
    """

    table: Table
    left_out: tuple[str, ...]
    shortened: bool

    def notes(self) -> list[str]:
        """Return the sentence that says what is missing, or nothing."""
        missing = [*self.left_out, *(["the ends of names of policies"] if self.shortened else [])]
        if not missing:
            return []
        return [
            f"Too narrow for: {', '.join(missing)}. A wider terminal or `kvprune results export` shows them."
        ]


def table(summary: Summary, width: int = 120, *, ranked: bool = False) -> Table:
    """Return the table, ready to print with rich.

    Args:
        summary: The results to show.
        width: Width of the terminal in characters; see `layout` for what is left out where it is too narrow.
        ranked: Order the rows of each keep ratio by the metric, the best first, and number them.
    """
    return layout(summary, width, ranked=ranked).table


def layout(summary: Summary, width: int = 120, *, ranked: bool = False) -> Layout:
    """Return the table that fits a terminal, and what it leaves out.

    If names of policies can be shortened enough, no column is left out. Otherwise, columns are left out until
    the rest fits. A table that still does not fit has names on several lines.

    Args:
        summary: The results to show.
        width: Width of the terminal in characters.
        ranked: See `table`.
    """
    every = columns(summary, ranked=ranked)
    there = {one.group for one in every} | {one.narrow[0] for one in every if one.narrow}
    if summary.window_seconds is not None:
        there.add("window")
    present = [group for group in _DROPPED_FIRST if group in there]
    for count in range(len(present) + 1):
        dropped = present[:count]
        shown = _build(summary, every, dropped, ranked, None)
        over = _measure(shown) - width
        if over <= 0:
            return Layout(table=shown, left_out=_words(every, dropped), shortened=False)
        short = _short_names(summary, over)
        if short is not None:
            shown = _build(summary, every, dropped, ranked, short)
            if _measure(shown) <= width:
                return Layout(table=shown, left_out=_words(every, dropped), shortened=True)
    return Layout(
        table=_build(summary, every, present, ranked, None), left_out=_words(every, present), shortened=False
    )


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Group rows by budget: none first, then each keep ratio, then other budgets by what they read."""
    free = [row for row in rows if not row.budget]
    ratios = sorted({row.keep_ratio for row in rows if row.keep_ratio is not None}, reverse=True)
    by_ratio = [[row for row in rows if row.keep_ratio == ratio] for ratio in ratios]
    others = sorted((r for r in rows if r.budget and r.keep_ratio is None), key=lambda r: -r.read)
    return [group for group in (free, *by_ratio, others) if group]


def ranking(group: Sequence[Row]) -> list[Row]:
    """Return rows of one keep ratio by the metric, the best first, contrasts and references last.

    Other groups stay as they are.
    """
    if group[0].keep_ratio is None:
        return list(group)
    return sorted(group, key=lambda row: (row.is_reference, row.is_contrast, row.badness))


def _build(
    summary: Summary,
    every: Sequence[Column],
    dropped: Collection[str],
    ranked: bool,
    names: dict[str, str] | None,
) -> Table:
    from rich import box
    from rich.table import Table

    kept = [one for one in every if not one.group or one.group not in dropped]
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False, collapse_padding=True)
    if ranked:
        shown.add_column("#", justify="right", no_wrap=True)
    shown.add_column("policy", overflow="fold")
    shown.add_column("budget", no_wrap=True)
    window = None if "window" in dropped else summary.window_seconds
    cells = []
    for one in kept:
        narrow = one.narrow is not None and one.narrow[0] in dropped
        heading, cell = one.narrow[1:] if narrow and one.narrow else (one.heading, one.cell)
        shown.add_column(_plain(heading), justify="right", no_wrap=True)
        cells.append(cell)
    for group in groups(summary.rows):
        for row in ranking(group) if ranked else group:
            first = [_place(row, group)] if ranked else []
            name = (names or {}).get(row.label, row.label)
            texts = [*first, name, budget(row, window), *(cell(row) for cell in cells)]
            shown.add_row(*map(_plain, texts))
        shown.add_section()
    return shown


def _plain(text: str) -> Text:
    """Return text that any console prints as it is: names of tasks are no markup and no :emoji:."""
    from rich.text import Text

    return Text(printable(text))


def _measure(shown: Table) -> int:
    """Return the width that a table takes if nothing is wrapped."""
    from rich.console import Console

    return Console(width=_WIDEST).measure(shown).maximum


def _short_names(summary: Summary, over: int) -> dict[str, str] | None:
    """Return names of policies that are shorter by `over`; None where they would be too short, or alike."""
    from rich.cells import cell_len
    from rich.text import Text

    labels = dict.fromkeys(row.label for row in summary.rows)
    longest = max(cell_len(printable(label)) for label in labels) - over
    if longest < _SHORTEST_NAME:
        return None
    found = {}
    for label in labels:
        text = Text(printable(label))
        text.truncate(longest, overflow="ellipsis")
        found[label] = text.plain
    return found if len(set(found.values())) == len(found) else None


def _words(every: Sequence[Column], dropped: Sequence[str]) -> tuple[str, ...]:
    """Return the headings of what was left out."""
    found = []
    for group in dropped:
        if group in ("intervals", "stock"):
            found.append({"intervals": "intervals", "stock": "stock's MiB"}[group])
        elif group == "tasks":
            found.append(f"{sum(one.group == group for one in every)} tasks")
        else:
            found += [one.heading for one in every if one.group == group]
    return tuple(found)


def _place(row: Row, group: Sequence[Row]) -> str:
    """Return a row's rank in its group; equal values share one; references and contrasts have none."""
    if row.keep_ratio is None:
        return ""
    if row.is_reference:
        return "ref"
    if row.is_contrast:
        return "two"
    return str(1 + sum(other.badness < row.badness for other in group if other.competes))
