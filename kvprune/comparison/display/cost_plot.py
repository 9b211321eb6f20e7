"""The figure of cost: cache held, and time per token, against the metric, with the Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvprune.comparison.display.curves import (
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
from kvprune.comparison.display.naming import budget
from kvprune.comparison.statistics.summary import Row, Summary
from kvprune.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["pareto_front", "render_cost"]

_LONGEST_NAME = 44
Cost = Callable[[Row], float | None]


def pareto_front(rows: Sequence[Row], cost: Cost) -> list[Row]:
    """Return the rows that no other row beats: none is as cheap and better, or as good and cheaper.

    Rows that may look at the answer take no part, nor do rows without a cost.

    Args:
        rows: Rows of a table.
        cost: Cost of a row; None where it is not known.

    Returns:
        The rows by ascending cost.
    """
    known = [(price, row.badness, row) for row in rows if (price := cost(row)) is not None]
    front: list[Row] = []
    best = float("inf")
    for _, badness, row in sorted((one for one in known if not one[2].is_reference), key=lambda one: one[:2]):
        if badness < best:
            front.append(row)
            best = badness
    return front


def render_cost(summary: Summary) -> bytes:
    """Draw the figure and return it as PNG.

    One panel has the MiB of cross-attention cache per example. If anything was timed, a second one has the
    time per token relative to the full cache. The rows of the front are numbered, and named under the panel.
    """
    from matplotlib.lines import Line2D

    unit = "utterance" if summary.kind == "speech" else "example"
    panels: list[tuple[str, Cost]] = [(f"MiB of cross-attention cache per {unit} (log scale)", _mebibytes)]
    if any(_token_ratio(row) is not None for row in summary.rows):
        panels.append((f"time per token relative to {summary.reference.spec}", _token_ratio))
    found = curves(summary)
    fronts = [pareto_front(summary.rows, cost) for _, cost in panels]
    longest = max(map(len, fronts))
    height = max(4.2 + 0.17 * (longest + 1), 0.21 * (len(found) + 4))
    made = figure((5.2 * len(panels) + 3.4, height))
    axes = made.subplots(1, len(panels), squeeze=False, sharey=True)
    for axis, (label, cost), front in zip(axes.flat, panels, fronts, strict=True):
        _panel(axis, summary, found, cost, front)
        names = [f"{number}  {_name(row, summary)}" for number, row in enumerate(front, start=1)]
        names += [""] * (longest - len(names))
        axis.set_xlabel(
            "\n".join([label, "", "Pareto front:", *names]), parse_math=False, fontsize=9, ma="left"
        )
    axes[0][0].set_ylabel(metric_label(summary))
    axes[0][0].set_xscale("log")
    _plain_ticks(axes[0][0])
    handles = curve_legend(summary, list(found))
    full = f"{summary.reference.spec} (nothing dropped)"
    handles.append(Line2D([], [], color="0.35", marker="h", linestyle="", markersize=8, label=full))
    handles.append(Line2D([], [], color="0.7", linewidth=5, alpha=0.6, label="Pareto front"))
    add_legend(made, handles, beside=True)
    return png(made)


def _panel(axis: Axes, summary: Summary, found: dict[str, list[Row]], cost: Cost, front: list[Row]) -> None:
    """Draw one panel: all rows, the front as a wide grey step, references dashed."""
    from matplotlib.patheffects import withStroke

    axis.step(
        [cost(row) or 0.0 for row in front],
        [row.main.value for row in front],
        where="post",
        color="0.7",
        linewidth=5,
        alpha=0.6,
        zorder=1,
    )
    for number, rows in enumerate(found.values()):
        known = [(price, row.main.value) for row in rows if (price := cost(row)) is not None]
        looks = style(number) | {"linewidth": 0.7, "alpha": 0.6}
        axis.plot([price for price, _ in known], [value for _, value in known], zorder=2, **looks)
    for rows in references(summary).values():
        known = [(price, row.main.value) for row in rows if (price := cost(row)) is not None]
        axis.plot([p for p, _ in known], [value for _, value in known], zorder=2, **REFERENCE_STYLE)
    full = cost(summary.reference)
    if full is not None:
        axis.plot([full], [summary.reference.main.value], "h", color="0.35", markersize=8, zorder=3)
    for number, row in enumerate(front, start=1):
        point = cost(row) or 0.0, row.main.value
        axis.plot(*point, "o", color="black", markerfacecolor="none", markersize=9, zorder=4)
        text = axis.annotate(
            str(number),
            point,
            textcoords="offset points",
            xytext=(-7, 6) if number % 2 else (8, -12),
            ha="center",
            fontsize=8,
            fontweight="bold",
            zorder=5,
        )
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    metric_scale(axis, summary, whole=False)


def _plain_ticks(axis: Axes) -> None:
    """Write sizes as people do: 0.5 and not 5 x 10^-1."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(lambda size, _: f"{size:.4g}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def _name(row: Row, summary: Summary) -> str:
    name = printable(row.label, _LONGEST_NAME)
    return (
        f"{name}  {budget(row)}  ({100 * row.main.value:.1f} %)"
        if row.budget
        else (f"{name}  ({100 * row.main.value:.1f} %)")
    )


def _mebibytes(row: Row) -> float | None:
    return row.bytes_held / 2**20


def _token_ratio(row: Row) -> float | None:
    if row.speed is None or row.speed.token_ratio is None:
        return None
    return row.speed.token_ratio.median
