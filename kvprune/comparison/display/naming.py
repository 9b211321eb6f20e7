"""How names, ratios, budgets and p-values are written, wherever a comparison is shown."""

from __future__ import annotations

from kvprune.comparison.statistics.speed import Ratio
from kvprune.comparison.statistics.summary import Row
from kvprune.text import printable

__all__ = ["LONGEST_TASK", "budget", "named", "p_text", "times"]

LONGEST_TASK = 60
"""Longer names of tasks are shortened where they are shown."""


def named(task: str) -> str:
    """Return the name of a task: printable, and not long."""
    return printable(task, LONGEST_TASK)


def budget(row: Row, window: float | None = None) -> str:
    """Return the budget of a row as people say it.

    Args:
        row: The row.
        window: Seconds that the encoder reads, for speech.
    """
    if row.keep_ratio is not None:
        share = f"{100 * row.keep_ratio:.4g} %"
        return share if window is None else f"{share} of {window:.1f} s"
    kind, _, value = row.budget.partition("=")
    if kind != "keep_tokens":
        return row.budget
    return f"{value} tokens" if window is None else f"{value} audio frames"


def p_text(p_value: float) -> str:
    """Return a p-value as papers write it.

    Example:
        >>> p_text(0.03456), p_text(0.00001)
        ('0.035', '< 0.001')
    """
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def times(ratio: Ratio | None, invert: bool = False) -> str:
    """Return a ratio of times as text, such as ``x0.80``; ``?`` where there is none.

    Args:
        ratio: The ratio.
        invert: Return one over the ratio.
    """
    if ratio is None:
        return "?"
    return f"x{1 / ratio.median if invert else ratio.median:.2f}"
