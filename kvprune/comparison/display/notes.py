"""Notes under the table of a comparison: what was measured, and what to be careful about."""

from __future__ import annotations

import statistics

from kvprune.comparison.statistics.speed import Ratio
from kvprune.comparison.statistics.summary import Summary
from kvprune.comparison.storage.timings import TIMED_TOKENS
from kvprune.text import printable

__all__ = ["LONGEST_TASK", "notes", "times"]

LONGEST_TASK = 60
"""Longer names of tasks are shortened where they are shown."""

_TOLERANCE = 0.03
"""Kept fractions farther from the requested one get a note. In small images rounding up may add 0.02."""


def notes(summary: Summary, *, ranked: bool = False) -> list[str]:
    """Return the sentences under the table, printable: what was measured, what to be careful about.

    Args:
        summary: What the table shows.
        ranked: Whether the table is ranked; see `table`.
    """
    said = [
        _examples_note(summary, ranked),
        _constant_answer_note(summary),
        _reading_note(summary),
        *(_ranking_note(summary.against) if ranked else ()),
        *_timing_notes(summary),
        *_unfinished_note(summary),
        *_budget_notes(summary),
        *_reach_note(summary),
    ]
    return [printable(note) for note in said]


def _examples_note(summary: Summary, ranked: bool) -> str:
    asked = f"{summary.examples} examples"
    if len(summary.tasks) > 1:
        totals = (f"{_named(task)} {summary.reference.tasks[task].total}" for task in summary.tasks)
        asked += f" ({', '.join(totals)})"
    memory = "MiB is" if ranked else "MiB/stock is"
    stock = "" if ranked else ", with the policy and in stock transformers"
    return (
        f"{asked}; 95 % Wilson intervals; kept % is the share of visible tokens that is kept; "
        f"{memory} the cross-attention cache of one example{stock}."
    )


def _named(task: str) -> str:
    return printable(task, LONGEST_TASK)


def _constant_answer_note(summary: Summary) -> str:
    shares = (f"{_named(task)} {100 * share:.0f} %" for task, share in summary.constant_answer.items())
    return f"Right if always giving a task's most frequent answer: {', '.join(shares)}."


def _unfinished_note(summary: Summary) -> list[str]:
    worst = max(summary.rows, key=lambda row: row.unfinished)
    if not worst.unfinished:
        return []
    return [
        f"Careful: {summary.reference.unfinished} of {summary.examples} answers of {summary.reference.spec} "
        f"({worst.unfinished} of {worst.spec}) were cut at --max-new-tokens."
    ]


def _budget_notes(summary: Summary) -> list[str]:
    return [
        f"Careful: {row.spec} kept {100 * row.kept_fraction:.1f} % of visible tokens instead of "
        f"{100 * row.keep_ratio:.4g} %; do not compare it with its neighbours."
        for row in summary.rows
        if row.keep_ratio is not None and abs(row.kept_fraction - row.keep_ratio) > _TOLERANCE
    ]


def _reach_note(summary: Summary) -> list[str]:
    """Warn where policies that prune after prefill stand beside policies that prune in prefill."""
    later = [row.spec for row in summary.rows if row.reach == "layer"]
    mixed = any(row.budget and row.reach != "layer" for row in summary.rows)
    if not later or not mixed or summary.reread:
        return []
    return [
        f"Careful: {later[0]} prunes after prefill (reach=layer), so its first token still uses the "
        "full cache; others prune in prefill. Compare only policies that prune at the same point, or add "
        "reach=onward or --reread."
    ]


def _reading_note(summary: Summary) -> str:
    if summary.reread:
        return (
            "The last token of each prompt was read again from the pruned cache, so even the first token of "
            "an answer depends on what was kept."
        )
    return "Plain generate: the first token of an answer is computed before a policy prunes after prefill."


def _ranking_note(against: str) -> list[str]:
    return [
        f"# is the rank by right answers within a budget; '- {against}' is the difference to {against} on "
        "the same questions, in points, with its 95 % paired interval; of many such intervals, some miss 0 "
        "by chance."
    ]


def _timing_notes(summary: Summary) -> list[str]:
    stock, full = summary.stock, summary.reference.speed
    if stock is None or full is None:
        return ["Nothing was timed."]
    ratios = [row.speed.prefill_ratio for row in summary.rows[1:] if row.speed is not None]
    ratios += [row.speed.token_ratio for row in summary.rows[1:] if row.speed and row.speed.token_ratio]
    spread = statistics.median((ratio.high - ratio.low) / 2 for ratio in ratios) if ratios else 0.0
    token = times(stock.token_ratio, invert=True)
    return [
        "prefill is the time until the first token, token that per later token, relative to "
        f"{summary.reference.spec}; measured in turns on {summary.device}, batches of {summary.batch_size}, "
        f"{TIMED_TOKENS} tokens, median of {summary.repetitions} repetitions, typical quartiles "
        f"+-{100 * spread:.0f} %.",
        f"{summary.reference.spec}: {full.prefill_ms:.1f} ms prefill, {full.token_ms:.2f} ms per token, "
        f"which is {times(stock.prefill_ratio, invert=True)} and {token} the time without kvprune.",
    ]


def times(ratio: Ratio | None, invert: bool = False) -> str:
    """Return a ratio of times as text, such as ``x0.80``; ``?`` where there is none.

    Args:
        ratio: The ratio.
        invert: Return one over the ratio.
    """
    if ratio is None:
        return "?"
    return f"x{1 / ratio.median if invert else ratio.median:.2f}"
