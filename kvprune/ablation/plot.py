"""The figure of a comparison: accuracy against the fraction of tokens kept, overall and by task."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

from kvprune.ablation.summary import Rate, Row, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["render"]

# Okabe and Ito's palette, told apart under the common kinds of colour blindness; yellow is too pale on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_COLUMNS = 3
_SHIFT = 0.03
"""Points of equal kept fraction are set apart sideways by this share of it per curve."""


def render(summary: Summary) -> bytes:
    """Draw the figure and return it as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels: list[str | None] = [*summary.tasks] if len(summary.tasks) == 1 else [None, *summary.tasks]
    columns = min(len(panels), _COLUMNS if len(panels) != 4 else 2)
    lines = math.ceil(len(panels) / columns)
    curves = _curves(summary)
    legend_rows = math.ceil((len(curves) + 2) / 3)
    height = 3.0 * lines + 0.25 * legend_rows + 0.6
    figure = Figure(figsize=(max(4.0 * columns, 7.5), height), dpi=150, layout="constrained")
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
    handles = [
        Line2D([], [], color=_colour(number), marker=_marker(number), markersize=5, label=label)
        for number, label in enumerate(curves)
    ]
    handles.append(
        Line2D([], [], color="0.35", linestyle="--", label=f"{summary.reference.spec} (nothing dropped)")
    )
    handles.append(Line2D([], [], color="0.6", linestyle=":", label="most frequent answer of the task"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    target = io.BytesIO()
    figure.savefig(target, format="png")
    return target.getvalue()


def _curves(summary: Summary) -> dict[str, list[Row]]:
    """Rows by curve, without the reference, from few tokens to many."""
    found: dict[str, list[Row]] = {}
    for row in sorted(summary.rows[1:], key=lambda row: row.kept_fraction):
        found.setdefault(_curve(row), []).append(row)
    order = dict.fromkeys(_curve(row) for row in summary.rows[1:])
    return {name: found[name] for name in order}


def _curve(row: Row) -> str:
    """Rows of one policy whose budgets are of one kind make one curve."""
    kind = row.budget.partition("=")[0]
    return row.label if kind in ("", "keep_ratio") else f"{row.label} ({kind})"


def _panel(axis: Axes, summary: Summary, curves: dict[str, list[Row]], task: str | None) -> None:
    """Draw one task, or all of them together where `task` is None."""
    from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

    budgeted = [label for label, rows in curves.items() if rows[0].budget]
    for number, (label, rows) in enumerate(curves.items()):
        place = budgeted.index(label) - (len(budgeted) - 1) / 2 if label in budgeted else 0.0
        shift = 1 + _SHIFT * place
        rates = [_rate(row, task) for row in rows]
        axis.errorbar(
            [row.kept_fraction * shift for row in rows],
            [share.value for share in rates],
            yerr=[[s.value - s.low for s in rates], [s.high - s.value for s in rates]],
            color=_colour(number),
            marker=_marker(number),
            markersize=5,
            linewidth=1.4,
            elinewidth=0.9,
            capsize=2,
        )
    axis.axhline(_rate(summary.reference, task).value, color="0.35", linestyle="--", linewidth=1.2, zorder=1)
    if task is not None:
        axis.axhline(summary.constant_answer[task], color="0.6", linestyle=":", linewidth=1.2, zorder=1)
    ticks = sorted({row.keep_ratio for row in summary.rows if row.keep_ratio is not None} | {1.0})
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(lambda fraction, _: f"{100 * fraction:.3g} %")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_ylim(-0.03, 1.03)
    axis.set_title(task or "overall", fontsize=10)
    axis.grid(color="0.92")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _rate(row: Row, task: str | None) -> Rate:
    return row.accuracy if task is None else row.tasks[task]


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _marker(number: int) -> str:
    return _MARKERS[number % len(_MARKERS)]
