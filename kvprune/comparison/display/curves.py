"""What all figures share: curves, their styles, scales and legends."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from kvprune.comparison.statistics.summary import Row, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = [
    "FEW",
    "REFERENCE_STYLE",
    "add_legend",
    "curve_legend",
    "curves",
    "figure",
    "metric_label",
    "metric_scale",
    "png",
    "rate_scale",
    "references",
    "style",
]

# The palette of Okabe and Ito, which readers with common kinds of colour blindness can tell apart. Its yellow
# is left out: it is too pale on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_LINES: tuple[str | tuple[int, tuple[int, ...]], ...] = ("-", (0, (4, 1)), (0, (1, 1)), (0, (5, 1, 1, 1)))

REFERENCE_STYLE: dict[str, Any] = {
    "color": "0.35",
    "marker": "*",
    "linestyle": "--",
    "markersize": 8,
    "linewidth": 1.4,
}
"""Style of rows that show what is possible."""

FEW = 9
"""With more curves than this, intervals are left out and the legend stands beside the figure, best first."""

_LINEAR = 0.01
"""Error rates below this are drawn on a linear scale, so that 0 has a place."""


def curves(summary: Summary) -> dict[str, list[Row]]:
    """Return rows by curve, without the full cache and references, by ascending fraction read.

    Curves come in the order of the summary; more than `FEW` by their mean, the best first.
    """
    rows = [row for row in summary.rows[1:] if not row.is_reference]
    found = _by_curve(rows)
    order = list(dict.fromkeys(_curve(row) for row in rows))
    if len(order) > FEW:
        sign = -1 if summary.higher_is_better else 1
        order.sort(key=lambda name: sign * statistics.mean(row.main.value for row in found[name]))
    return {name: found[name] for name in order}


def references(summary: Summary) -> dict[str, list[Row]]:
    """Return rows that show what is possible, by curve, by ascending fraction read."""
    return _by_curve([row for row in summary.rows[1:] if row.is_reference])


def style(number: int) -> dict[str, Any]:
    """Return colour, marker and line of a curve: no two of the first 28 share colour and line."""
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _LINES[number // len(_COLOURS) % len(_LINES)],
        "markersize": 5,
        "linewidth": 1.4,
    }


def curve_legend(summary: Summary, names: Sequence[str]) -> list[Line2D]:
    """Return the entries of the legend: curves, references and the full cache."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **style(number), label=label) for number, label in enumerate(names)]
    handles += [
        Line2D([], [], **REFERENCE_STYLE, label=f"{name} (sees the answer)") for name in references(summary)
    ]
    return handles


def figure(size: tuple[float, float]) -> Figure:
    """Return an empty figure that needs no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(made)
    return made


def add_legend(made: Figure, handles: Sequence[Line2D], *, beside: bool) -> None:
    """Add a legend beside or below all panels; its names are no formulas."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    fitting = int(72 * made.get_figwidth() / (5.6 * longest + 60))  # points per line / points per entry
    place: dict[str, Any] = {"loc": "outside right upper"}
    if not beside:
        place = {"loc": "outside lower center", "ncols": max(1, min(3, fitting))}
    legend = made.legend(handles=handles, frameon=False, fontsize=9, handlelength=3.2, **place)
    for text in legend.get_texts():
        text.set_parse_math(False)


def metric_scale(axis: Axes, summary: Summary, *, whole: bool = True) -> None:
    """Set the vertical axis: 0 to 100 % for accuracy, a logarithmic one for error rates.

    One endless repetition makes an error rate of several hundred percent. On a linear axis it would press all
    others together.

    Args:
        axis: The axes.
        summary: What is drawn.
        whole: Show all of 0 to 100 % and not only the range of the points.
    """
    values = [row.main.value for row in summary.rows]
    if summary.higher_is_better:
        low, high = (0.0, 1.0) if whole else (min(values), max(values))
    else:
        by_task = [rate.value for row in summary.rows for rate in row.tasks.values()]
        low = min([*(row.main.low for row in summary.rows), *by_task] if whole else values)
        high = max([row.main.high for row in summary.rows] if whole else values)
    rate_scale(axis, low, high, shares=summary.higher_is_better, margin=0.03 if whole else 0.08)
    axis.grid(color="0.92")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def rate_scale(
    axis: Axes, low: float, high: float, *, shares: bool, margin: float = 0.03, along: Literal["x", "y"] = "y"
) -> None:
    """Set scale, ticks and limits of one axis: linear for shares, logarithmic for error rates.

    Args:
        axis: The axes.
        low: The lowest rate to show.
        high: The highest rate to show.
        shares: Whether these are shares of right answers, and not error rates.
        margin: What is shown beyond them on either side, as a part of the range; at least 3 points. Error
            rates reach to the next tick instead.
        along: Which axis.
    """
    from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

    ticks_of = axis.yaxis if along == "y" else axis.xaxis
    set_limits = axis.set_ylim if along == "y" else axis.set_xlim
    if shares:
        ticks_of.set_major_formatter(PercentFormatter(1.0))
        room = max(0.03, margin * (high - low))
        set_limits(low - room, high + room)
        return
    ticks = [value / 100 for value in (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)]
    set_scale = axis.set_yscale if along == "y" else axis.set_xscale
    set_scale("symlog", linthresh=_LINEAR, linscale=0.5)
    ticks_of.set_major_locator(FixedLocator(ticks))
    ticks_of.set_minor_locator(NullLocator())
    ticks_of.set_major_formatter(lambda rate, _: f"{100 * rate:.0f} %")
    bottom = max(tick for tick in ticks if tick <= low)
    set_limits(bottom, next((tick for tick in ticks if tick > high), high))


def metric_label(summary: Summary) -> str:
    """Return the name of the metric, for the vertical axis."""
    return "right answers" if summary.higher_is_better else "word error rate (log scale above 1 %)"


def png(made: Figure) -> bytes:
    """Return a figure as PNG."""
    target = io.BytesIO()
    made.savefig(target, format="png")
    return target.getvalue()


def _by_curve(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.read):
        found.setdefault(_curve(row), []).append(row)
    return found


def _curve(row: Row) -> str:
    """Return the name of the curve that a row belongs to: its policy, with budgets of one kind."""
    kind = row.budget.partition("=")[0]
    return row.label if kind in ("", "keep_ratio") else f"{row.label} ({kind})"
