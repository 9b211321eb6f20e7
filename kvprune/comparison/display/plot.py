"""The figure of a comparison: the metric against the fraction of tokens kept or read, overall and by task."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kvprune.comparison.display.curves import (
    FEW,
    REFERENCE_STYLE,
    add_legend,
    curve_legend,
    curves,
    figure,
    metric_label,
    metric_scale,
    png,
    references,
    style,
)
from kvprune.comparison.statistics.rates import Rate
from kvprune.comparison.statistics.summary import Row, Summary
from kvprune.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["render"]

_COLUMNS = 3
_SHIFT = 0.03
"""Points of equal fraction are shifted sideways, curve by curve, by this share of the fraction."""
_WIDEST = 0.24
"""The shifts of all curves together span at most this share, so that budgets stay apart."""
_LONGEST_TITLE = 40


def render(summary: Summary) -> bytes:
    """Draw the figure and return it as PNG."""
    from matplotlib.lines import Line2D

    panels: list[str | None] = [*summary.tasks] if len(summary.tasks) == 1 else [None, *summary.tasks]
    columns = min(len(panels), _COLUMNS if len(panels) != 4 else 2)
    lines = math.ceil(len(panels) / columns)
    found = curves(summary)
    many = len(found) > FEW
    if many:
        size = 4.5 * columns + 2.6, max(3.6 * lines, 0.2 * (len(found) + 4))
    else:
        size = max(4.0 * columns, 7.5), 3.0 * lines + 0.25 * math.ceil((len(found) + 3) / 3) + 0.6
    made = figure(size)
    axes = made.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axis, task in zip(axes.flat, panels, strict=False):
        _panel(axis, summary, found, task)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    for axis in list(axes.flat)[max(0, len(panels) - columns) : len(panels)]:
        axis.set_xlabel(_kept_label(summary))
        axis.xaxis.set_tick_params(labelbottom=True)
    for line in axes:
        line[0].set_ylabel(metric_label(summary))
    handles = curve_legend(summary, list(found))
    handles.append(
        Line2D([], [], color="0.35", linestyle="-.", label=f"{summary.reference.spec} (nothing dropped)")
    )
    if summary.constant_answer:
        handles.append(Line2D([], [], color="0.6", linestyle=":", label="most frequent answer of the task"))
    add_legend(made, handles, beside=many)
    return png(made)


def _kept_label(summary: Summary) -> str:
    """Return what the horizontal axis shows: what is kept, and so what a decode step reads."""
    kept = "read in a decode step" if summary.reads_less else "kept"
    if summary.window_seconds is None:
        return f"visible tokens {kept} (log scale)"
    return f"{kept} of {summary.window_seconds:.0f} s (log scale)"


def _panel(axis: Axes, summary: Summary, found: dict[str, list[Row]], task: str | None) -> None:
    """Draw the panel of one task, or that of all tasks together where `task` is None."""
    budgeted = [label for label, rows in found.items() if rows[0].budget]
    shift_each = min(_SHIFT, _WIDEST / max(1, len(budgeted)))
    for number, (label, rows) in enumerate(found.items()):
        place = budgeted.index(label) - (len(budgeted) - 1) / 2 if label in budgeted else 0.0
        shift = 1 + shift_each * place
        rates = [_rate(row, task) for row in rows]
        intervals = [[rate.value - rate.low for rate in rates], [rate.high - rate.value for rate in rates]]
        axis.errorbar(
            [row.read * shift for row in rows],
            [rate.value for rate in rates],
            yerr=None if len(found) > FEW else intervals,
            elinewidth=0.9,
            capsize=2,
            **style(number),
        )
    for rows in references(summary).values():
        axis.plot([row.read for row in rows], [_rate(row, task).value for row in rows], **REFERENCE_STYLE)
    axis.axhline(_rate(summary.reference, task).value, color="0.35", linestyle="-.", linewidth=1.2, zorder=1)
    if task is not None and task in summary.constant_answer:
        axis.axhline(summary.constant_answer[task], color="0.6", linestyle=":", linewidth=1.2, zorder=1)
    # A name with two "$" would be read as a formula, and most names are none.
    title = "overall" if task is None else printable(task, _LONGEST_TITLE)
    axis.set_title(title, fontsize=10, parse_math=False)
    _scales(axis, summary)


def _scales(axis: Axes, summary: Summary) -> None:
    """Set the scales, ticks and grid that all panels share."""
    from matplotlib.ticker import FixedLocator, NullLocator

    ticks = sorted({row.keep_ratio for row in summary.rows if row.keep_ratio is not None} | {1.0})
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(lambda fraction, _: f"{100 * fraction:.3g} %")
    metric_scale(axis, summary)


def _rate(row: Row, task: str | None) -> Rate:
    return row.main if task is None else row.tasks[task]
