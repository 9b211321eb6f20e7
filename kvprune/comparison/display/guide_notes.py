"""Notes on a guide: what it gains and costs against a model that guides itself, and how it answers alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from kvprune.comparison.display.naming import budget, times
from kvprune.comparison.statistics.contrasts import Contrast
from kvprune.comparison.statistics.speed import Ratio
from kvprune.comparison.statistics.summary import Row, Summary
from kvprune.comparison.storage.timings import TIMED_TOKENS

__all__ = ["guide_notes"]


def guide_notes(summary: Summary) -> list[str]:
    """Return what has to be said about the rows of a guide; nothing where there are none.

    Args:
        summary: What the table shows.
    """
    own = {row.spec: row for row in summary.rows}
    guided = [row for row in summary.rows if row.guide == "guides"]
    found = []
    for label in dict.fromkeys(row.label for row in guided):
        pairs = [(row, own[row.self_guided]) for row in guided if row.label == label and row.self_guided]
        if pairs:
            found.append(_gain(summary, pairs))
            found += _cost(summary, pairs)
    return found + [_alone(summary, row) for row in summary.rows if row.guide == "answers"]


def _gain(summary: Summary, pairs: Sequence[tuple[Row, Row]]) -> str:
    """Say for each budget what the guide gains; pairs are a guided row and its self-guided one."""
    metric = "right %" if summary.higher_is_better else "WER %"
    values = [
        f"{budget(row, summary.window_seconds)}: {100 * row.main.value:.1f} and {100 * own.main.value:.1f}, "
        f"{_points(row.versus_self_guided)}"
        for row, own in pairs
    ]
    (row, own), *_ = pairs
    return (
        f"{row.label} is guided by another model, {own.label} by the model itself. {metric} of both, and "
        f"their paired difference [95 %]: {'; '.join(values)}."
    )


def _cost(summary: Summary, pairs: Sequence[tuple[Row, Row]]) -> list[str]:
    """Say what a pass of the guide costs, and one of the model itself; it is the same at all budgets."""
    known = [(row.speed, own.speed) for row, own in pairs if row.speed and own.speed]
    ratio, by_itself = (
        _middle([row.guide_ratio for row, _ in known]),
        _middle([own.guide_ratio for _, own in known]),
    )
    if ratio is None:
        return []
    held, by_model = (max(one.guide_bytes for one in speeds) / 2**20 for speeds in zip(*known, strict=True))
    return [
        f"The guide's pass takes {times(ratio)} the time of a whole answer of {summary.reference.spec} "
        f"({TIMED_TOKENS} tokens; quartiles {ratio.low:.2f} to {ratio.high:.2f}), that of the model itself "
        f"{times(by_itself)}; prefill includes it. During its pass, the guide holds at most {held:.3g} MiB "
        f"of cross-attention cache of one example, the model itself {by_model:.3g}; MiB does not include it."
    ]


def _alone(summary: Summary, row: Row) -> str:
    metric = "right" if summary.higher_is_better else "WER"
    return (
        f"{row.label} is the guide alone with its own full cache: {100 * row.main.value:.1f} % {metric}, "
        f"{_points(row.versus_full)} to {summary.reference.spec}. Only where a guided row is better does "
        "the large model add anything."
    )


def _middle(ratios: Sequence[Ratio | None]) -> Ratio | None:
    """Return the medians of median and quartiles over rows."""
    known = [ratio for ratio in ratios if ratio is not None]
    if not known:
        return None
    return Ratio(
        *(statistics.median(getattr(ratio, name) for ratio in known) for name in ("median", "low", "high"))
    )


def _points(found: Contrast | None) -> str:
    if found is None:
        return "?"
    return f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
