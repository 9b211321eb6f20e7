"""Notes under the table of a comparison: how it was measured, and what to be careful about."""

from __future__ import annotations

import statistics

from kvprune.comparison.statistics.speed import Ratio
from kvprune.comparison.statistics.summary import BASELINE, Summary
from kvprune.comparison.storage.timings import TIMED_TOKENS

__all__ = ["notes", "times"]

_TOLERANCE = 0.03
"""Kept fractions farther from what was asked for get a note; rounding up may add 0.02 in small images."""


def notes(summary: Summary, *, ranked: bool = False) -> list[str]:
    """Return sentences that stand under the table: what was measured, and what to be careful about."""
    asked = f"{summary.examples} examples"
    if len(summary.tasks) > 1:
        asked += f" ({', '.join(f'{task} {summary.reference.tasks[task].total}' for task in summary.tasks)})"
    stock = "" if ranked else ", and what stock transformers holds"
    lines = [
        f"{asked}; 95 % Wilson intervals; kept % is of visible tokens; MiB is the cross-attention cache "
        f"of one example{stock}.",
        "Always giving a task's most frequent answer: "
        + ", ".join(f"{task} {100 * share:.0f} %" for task, share in summary.constant_answer.items())
        + ".",
        *_late_note(summary),
        *(_ranking_note() if ranked else ()),
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
    if later and not summary.late_tokens and any(row.budget and row.reach != "layer" for row in summary.rows):
        lines.append(
            f"Careful: {later[0]} prunes after prefill (reach=layer), so its first token still uses the "
            "full cache; others prune in prefill. Compare within one kind, or add reach=onward or "
            "--late-tokens 1."
        )
    return lines


def _late_note(summary: Summary) -> list[str]:
    if not summary.late_tokens:
        return []
    count = "token" if summary.late_tokens == 1 else f"{summary.late_tokens} tokens"
    return [
        f"The last {count} of each prompt came after pruning (--late-tokens {summary.late_tokens}), the full "
        "cache's too: answers show what was dropped from their first token on."
    ]


def _ranking_note() -> list[str]:
    return [
        f"# orders one budget by right answers; '- {BASELINE}' is the difference to {BASELINE} on the same "
        "questions, in points, with its 95 % paired interval; among many, some miss 0 by chance."
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
        f"prefill and token: time relative to {summary.reference.spec} until the first token, and per later "
        f"token; side by side on {summary.device}, batches of {summary.batch_size}, {TIMED_TOKENS} tokens, "
        f"median of {summary.repetitions} repetitions, typical quartiles +-{100 * spread:.0f} %.",
        f"{summary.reference.spec}: {full.prefill_ms:.1f} ms prefill, {full.token_ms:.2f} ms per token, "
        f"which is {times(stock.prefill_ratio, invert=True)} and {token} the time without kvprune.",
    ]


def times(ratio: Ratio | None, invert: bool = False) -> str:
    """Return a ratio, or how many times faster it is, such as ``x0.80``; ``?`` where there is none."""
    if ratio is None:
        return "?"
    return f"x{1 / ratio.median if invert else ratio.median:.2f}"
