"""The table of a comparison: rows grouped by budget, and notes that say how to read it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvprune.ablation.summary import Rate, Row, Summary
from kvprune.ablation.timing import TIMED_TOKENS, Ratio

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["groups", "notes", "table"]

_TOLERANCE = 0.03
"""Kept fractions farther from what was asked for get a note; rounding up may add 0.02 in small images."""


def table(summary: Summary, width: int = 120) -> Table:
    """Return the table, ready to print with rich.

    Args:
        summary: What to show.
        width: Columns of the terminal; columns of single tasks are left out where they do not fit.
    """
    from rich.console import Console

    if len(summary.tasks) > 1:
        whole = _build(summary, summary.tasks)
        if Console(width=1000).measure(whole).maximum <= width:
            return whole
    return _build(summary, ())


def _build(summary: Summary, tasks: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    shown.add_column("policy", overflow="fold")
    shown.add_column("budget", no_wrap=True)
    for heading in ("kept %", "MiB/stock", "right % [95 %]", *tasks, "= full %"):
        shown.add_column(heading, justify="right", no_wrap=True)
    if summary.stock is not None:
        shown.add_column("prefill", justify="right", no_wrap=True)
        shown.add_column("token", justify="right", no_wrap=True)
    for group in groups(summary.rows):
        for row in group:
            shown.add_row(*_cells(row, tasks, summary.stock is not None), end_section=row is group[-1])
    return shown


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Group rows that compare directly: without budget, by keep ratio, then others by what they kept."""
    free = [row for row in rows if not row.budget]
    ratios = sorted({row.keep_ratio for row in rows if row.keep_ratio is not None}, reverse=True)
    by_ratio = [[row for row in rows if row.keep_ratio == ratio] for ratio in ratios]
    others = sorted((r for r in rows if r.budget and r.keep_ratio is None), key=lambda r: -r.kept_fraction)
    return [group for group in (free, *by_ratio, others) if group]


def notes(summary: Summary) -> list[str]:
    """Return sentences that stand under the table: what was measured, and what to be careful about."""
    asked = f"{summary.examples} examples"
    if len(summary.tasks) > 1:
        asked += f" ({', '.join(f'{task} {summary.reference.tasks[task].total}' for task in summary.tasks)})"
    lines = [
        f"{asked}; 95 % Wilson intervals; kept % is of visible tokens; MiB is the cross-attention cache "
        "of one example, and what stock transformers holds.",
        "Always giving a task's most frequent answer: "
        + ", ".join(f"{task} {100 * share:.0f} %" for task, share in summary.constant_answer.items())
        + ".",
        *_timing_notes(summary),
    ]
    unfinished = [row for row in summary.rows if row.unfinished]
    if unfinished:
        worst = max(unfinished, key=lambda row: row.unfinished)
        lines.append(
            f"Careful: {summary.reference.unfinished} of {summary.examples} answers of "
            f"{summary.reference.spec} ({worst.unfinished} of {worst.spec}) were cut at --max-new-tokens."
        )
    for row in summary.rows:
        if row.keep_ratio is not None and abs(row.kept_fraction - row.keep_ratio) > _TOLERANCE:
            lines.append(
                f"Careful: {row.spec} kept {100 * row.kept_fraction:.1f} % of visible tokens instead of "
                f"{100 * row.keep_ratio:.4g} %; do not compare it with its neighbours."
            )
    later = [row.spec for row in summary.rows if row.reach == "layer"]
    if later and any(row.budget and row.reach != "layer" for row in summary.rows):
        lines.append(
            f"Careful: {later[0]} prunes after prefill (reach=layer), so its first token still uses the "
            "full cache; others prune in prefill. Compare within one kind, or add reach=onward."
        )
    return lines


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
            _times(speed.prefill_ratio if speed else None),
            _times(speed.token_ratio if speed else None),
        ]
    return cells


def _timing_notes(summary: Summary) -> list[str]:
    stock, full = summary.stock, summary.reference.speed
    if stock is None or full is None:
        return ["Nothing was timed."]
    ratios = [row.speed.prefill_ratio for row in summary.rows[1:] if row.speed is not None]
    ratios += [row.speed.token_ratio for row in summary.rows[1:] if row.speed and row.speed.token_ratio]
    spread = statistics.median((ratio.high - ratio.low) / 2 for ratio in ratios) if ratios else 0.0
    token = _times(stock.token_ratio, invert=True)
    return [
        f"prefill and token: time relative to {summary.reference.spec} until the first token, and per later "
        f"token; side by side on {summary.device}, batches of {summary.batch_size}, {TIMED_TOKENS} tokens, "
        f"median of {summary.repetitions} repetitions, typical quartiles +-{100 * spread:.0f} %.",
        f"{summary.reference.spec}: {full.prefill_ms:.1f} ms prefill, {full.token_ms:.2f} ms per token, "
        f"which is {_times(stock.prefill_ratio, invert=True)} and {token} the time without kvprune.",
    ]


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


def _times(ratio: Ratio | None, invert: bool = False) -> str:
    if ratio is None:
        return "?"
    return f"x{1 / ratio.median if invert else ratio.median:.2f}"
