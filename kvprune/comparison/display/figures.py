"""All figures of a comparison, by the name of the file that holds each."""

from __future__ import annotations

from kvprune.comparison.display.cost_plot import render_cost
from kvprune.comparison.display.plot import render
from kvprune.comparison.statistics.summary import Summary
from kvprune.comparison.storage.results_folder import COST_PLOT, PLOT

__all__ = ["figures"]


def figures(summary: Summary) -> dict[str, bytes]:
    """Return each figure as PNG, by the name of its file in the results folder."""
    return {PLOT: render(summary), COST_PLOT: render_cost(summary)}
