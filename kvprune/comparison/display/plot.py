"""The figure of a comparison: accuracy against the fraction of tokens kept, overall and by task."""

from __future__ import annotations

import io
import math
import statistics
from typing import TYPE_CHECKING, Any

from kvprune.comparison.statistics.rates import Rate
from kvprune.comparison.statistics.summary import Row, Summary
from kvprune.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["render"]

# The palette of Okabe and Ito, which readers with common kinds of colour blindness can tell apart. Its yellow
# is left out: it is too pale on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_COLUMNS = 3
_LINES: tuple[str | tuple[int, tuple[int, ...]], ...] = ("-", (0, (4, 1)), (0, (1, 1)), (0, (5, 1, 1, 1)))
_SHIFT = 0.03
"""Points of equal kept fraction are shifted sideways, curve by curve, by this share of the fraction."""
_WIDEST = 0.24
"""The shifts of all curves together span at most this share, so that budgets stay apart."""
_LONGEST_TITLE = 40
_FEW = 9
"""With more curves than this, intervals are left out and the legend stands beside the figure, best first."""


def render(summary: Summary) -> bytes:
    """Draw the figure and return it as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels: list[str | None] = [*summary.tasks] if len(summary.tasks) == 1 else [None, *summary.tasks]
    columns = min(len(panels), _COLUMNS if len(panels) != 4 else 2)
    lines = math.ceil(len(panels) / columns)
    curves = _curves(summary)
    many = len(curves) > _FEW
    if many:
        size = 4.5 * columns + 2.6, max(3.6 * lines, 0.2 * (len(curves) + 3))
    else:
        size = max(4.0 * columns, 7.5), 3.0 * lines + 0.25 * math.ceil((len(curves) + 2) / 3) + 0.6
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axis, task in zip(axes.flat, panels, strict=False):
        _panel(axis, summary, curves, task)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    for axis in list(axes.flat)[max(0, len(panels) - columns) : len(panels)]:
        axis.set_xlabel("visible tokens kept (log scale)")
        axis.xaxis.set_tick_params(labelbottom=True)
    for line in axes:
        line[0].set_ylabel("right answers")
    handles = [Line2D([], [], **_style(number), label=label) for number, label in enumerate(curves)]
    handles.append(
        Line2D([], [], color="0.35", linestyle="--", label=f"{summary.reference.spec} (nothing dropped)")
    )
    handles.append(Line2D([], [], color="0.6", linestyle=":", label="most frequent answer of the task"))
    place: dict[str, Any] = (
        {"loc": "outside right upper"} if many else {"loc": "outside lower center", "ncols": 3}
    )
    legend = figure.legend(handles=handles, frameon=False, fontsize=9, handlelength=3.2, **place)
    for text in legend.get_texts():
        text.set_parse_math(False)
    target = io.BytesIO()
    figure.savefig(target, format="png")
    return target.getvalue()


def _curves(summary: Summary) -> dict[str, list[Row]]:
    """Return rows by curve, without the full cache, by ascending kept fraction.

    Curves come in the order of the summary; more than `_FEW` by descending mean accuracy.
    """
    found: dict[str, list[Row]] = {}
    for row in sorted(summary.rows[1:], key=lambda row: row.kept_fraction):
        found.setdefault(_curve(row), []).append(row)
    order = list(dict.fromkeys(_curve(row) for row in summary.rows[1:]))
    if len(order) > _FEW:
        order.sort(key=lambda name: -statistics.mean(row.accuracy.value for row in found[name]))
    return {name: found[name] for name in order}


def _curve(row: Row) -> str:
    """Return the name of the curve that a row belongs to: its policy, with budgets of one kind."""
    kind = row.budget.partition("=")[0]
    return row.label if kind in ("", "keep_ratio") else f"{row.label} ({kind})"


def _panel(axis: Axes, summary: Summary, curves: dict[str, list[Row]], task: str | None) -> None:
    """Draw the panel of one task, or that of all tasks together where `task` is None."""
    budgeted = [label for label, rows in curves.items() if rows[0].budget]
    shift_each = min(_SHIFT, _WIDEST / max(1, len(budgeted)))
    for number, (label, rows) in enumerate(curves.items()):
        place = budgeted.index(label) - (len(budgeted) - 1) / 2 if label in budgeted else 0.0
        shift = 1 + shift_each * place
        rates = [_rate(row, task) for row in rows]
        intervals = [[rate.value - rate.low for rate in rates], [rate.high - rate.value for rate in rates]]
        axis.errorbar(
            [row.kept_fraction * shift for row in rows],
            [rate.value for rate in rates],
            yerr=None if len(curves) > _FEW else intervals,
            elinewidth=0.9,
            capsize=2,
            **_style(number),
        )
    axis.axhline(_rate(summary.reference, task).value, color="0.35", linestyle="--", linewidth=1.2, zorder=1)
    if task is not None:
        axis.axhline(summary.constant_answer[task], color="0.6", linestyle=":", linewidth=1.2, zorder=1)
    # A name with two "$" would be read as a formula, and most names are none.
    title = "overall" if task is None else printable(task, _LONGEST_TITLE)
    axis.set_title(title, fontsize=10, parse_math=False)
    _scales(axis, summary)


def _scales(axis: Axes, summary: Summary) -> None:
    """Set the scales, ticks and grid that all panels share."""
    from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

    ticks = sorted({row.keep_ratio for row in summary.rows if row.keep_ratio is not None} | {1.0})
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(lambda fraction, _: f"{100 * fraction:.3g} %")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_ylim(-0.03, 1.03)
    axis.grid(color="0.92")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _rate(row: Row, task: str | None) -> Rate:
    return row.accuracy if task is None else row.tasks[task]


def _style(number: int) -> dict[str, Any]:
    """Return colour, marker and line of a curve: no two of the first 28 share colour and line."""
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _LINES[number // len(_COLOURS) % len(_LINES)],
        "markersize": 5,
        "linewidth": 1.4,
    }
