"""Notes under the table of a comparison: what was measured, and what to be careful about."""

from __future__ import annotations

import statistics

from kvprune.comparison.display.difference_notes import difference_notes
from kvprune.comparison.display.guide_notes import guide_notes
from kvprune.comparison.display.naming import named, times
from kvprune.comparison.statistics.summary import Row, Summary
from kvprune.comparison.storage.timings import TIMED_TOKENS
from kvprune.text import printable

__all__ = ["notes"]


def notes(summary: Summary, *, ranked: bool = False, encoder: str | None = None) -> list[str]:
    """Return the sentences under the table, printable: what was measured, what to be careful about.

    Args:
        summary: What the table shows.
        ranked: Whether the table is ranked; see `table`.
        encoder: What was reused of the encoder's work, in a sentence; None if that is not known.
    """
    said = [
        _examples_note(summary, ranked),
        *_constant_answer_note(summary),
        _reading_note(summary),
        *([encoder] if encoder else []),
        *difference_notes(summary, ranked=ranked),
        *guide_notes(summary),
        *_contrast_note(summary),
        *_draws_notes(summary),
        *_timing_notes(summary),
        *(_unfinished_note(summary) if summary.kind == "pictures" else _transcript_notes(summary)),
        *_read_notes(summary),
        *_budget_notes(summary),
        *_reach_note(summary),
    ]
    return [printable(note) for note in said]


def _contrast_note(summary: Summary) -> list[str]:
    if not any(row.is_contrast for row in summary.rows):
        return []
    return [
        "Rows with contrast=RULE run two branches, the full cache and a pruned one, and combine what both "
        "say (docs/contrast.md): the budget and kept % are those of the second branch, MiB and seconds of "
        "both; a second text cache comes on top. They save nothing, and have no rank."
    ]


def _examples_note(summary: Summary, ranked: bool) -> str:
    speech = summary.kind == "speech"
    asked = f"{summary.examples} {'utterances' if speech else 'examples'}"
    if len(summary.tasks) > 1:
        totals = (f"{named(task)} {count}" for task, count in summary.task_sizes.items())
        asked += f" ({', '.join(totals)})"
    memory, stock = "MiB is", "" if ranked else " (/stock: in stock transformers)"
    if speech:
        return (
            f"{asked}. WER and CER are word and character error rates: all errors divided by all words or "
            "characters of the references, lower is better, above 100 % where more was written than said; "
            f"95 % bootstrap intervals over utterances. kept s is how much of the encoder's "
            f"{summary.window_seconds:.0f} s window is kept; {memory} the cross-attention cache of one "
            f"utterance{stock}."
        )
    return (
        f"{asked}; 95 % Wilson intervals; kept % is the share of visible tokens that is kept; "
        f"{memory} the cross-attention cache of one example{stock}."
    )


def _constant_answer_note(summary: Summary) -> list[str]:
    shares = [f"{named(task)} {100 * share:.0f} %" for task, share in summary.constant_answer.items()]
    return [f"Right if always giving a task's most frequent answer: {', '.join(shares)}."] if shares else []


def _unfinished_note(summary: Summary) -> list[str]:
    worst = max(summary.rows, key=lambda row: row.unfinished)
    if not worst.unfinished:
        return []
    found = _worst(summary, "answers", summary.reference.unfinished, worst, worst.unfinished)
    return [f"Careful: {found} were cut at --max-new-tokens."]


def _transcript_notes(summary: Summary) -> list[str]:
    """Say how transcripts end, and how many were cut or repeat themselves."""

    def loops(row: Row) -> int:
        return row.speech.loops if row.speech else 0

    said = [
        "A transcript is cut at 1.5 times the tokens of the full cache's transcript plus 10 (cap in "
        "results.jsonl). capped counts transcripts cut there; loops counts transcripts that repeat "
        "themselves endlessly. Both count as errors in full."
    ]
    capped, endless = max(summary.rows, key=lambda row: row.unfinished), max(summary.rows, key=loops)
    if capped.unfinished:
        found = _worst(summary, "transcripts", summary.reference.unfinished, capped, capped.unfinished)
        said.append(f"Careful: {found} were cut at their limit.")
    if loops(endless):
        found = _worst(summary, "transcripts", loops(summary.reference), endless, loops(endless))
        said.append(
            f"Careful: {found} repeat themselves endlessly. A few of them can make up most of an error rate."
        )
    return said


def _worst(summary: Summary, what: str, own: int, worst: Row, count: int) -> str:
    """Return how many answers of the full cache, and of the row that has most, something happened to."""
    text = f"{own} of {summary.examples} {what} of {summary.reference.spec}"
    if worst.spec == summary.reference.spec:
        return text
    whole = f"{summary.examples * worst.draws} of " if worst.draws > 1 else ""
    return f"{text} ({count} of {whole}{worst.spec})"


def _draws_notes(summary: Summary) -> list[str]:
    """Say which policies drew, how often, and whether their luck is in the intervals."""
    several = [row for row in summary.rows if row.draws > 1]
    single = [row for row in summary.rows if len(row.seeds) == 1]
    found = []
    if several:
        names = ", ".join(dict.fromkeys(row.label for row in several))
        few = min(row.draws for row in several)
        seeds = ", ".join(map(str, several[0].seeds))
        found.append(
            f"{names} drew {few} times (seeds {seeds}): values are means over draws, and intervals count the "
            "luck of questions and of draws."
        )
        if few < 5:
            found.append(
                f"Careful: {few} draws say little about how different draws are; take five or more (--draws)."
            )
    if single:
        names = ", ".join(dict.fromkeys(row.label for row in single))
        found.append(
            f"Careful: {names} drew once (seed {single[0].seeds[0]}), and the luck of that draw is not in "
            "the intervals; --draws 5 counts it."
        )
    return found


def _read_notes(summary: Summary) -> list[str]:
    """Say what a decode step reads, where that is less than what is kept."""
    rows = dict.fromkeys(row.label for row in summary.rows if row.read_fraction is not None)
    if not rows:
        return []
    share = "%" if summary.window_seconds is None else "s"
    return [
        f"read {share} is what a decode step reads, mean over steps; {', '.join(rows)} "
        f"{'decide' if len(rows) > 1 else 'decides'} that in each step. kept {share} is "
        "what was there after the prompt; figures show what is read."
    ]


def _budget_notes(summary: Summary) -> list[str]:
    tokens = "visible tokens" if summary.window_seconds is None else "the audio frames"
    return [
        f"Careful: {row.spec} {'kept' if row.read_fraction is None else 'read in a step'} "
        f"{100 * row.read:.1f} % of {tokens} instead of {100 * row.keep_ratio:.4g} %; do not compare it with "
        "its neighbours."
        for row in summary.rows
        if row.keep_ratio is not None and row.misses_budget
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
        f"{summary.reference.spec}, under plain generate; measured in turns on {summary.device}, batches of "
        f"{summary.batch_size}, "
        f"{TIMED_TOKENS} tokens, median of {summary.repetitions} repetitions, typical quartiles "
        f"+-{100 * spread:.0f} %.",
        f"{summary.reference.spec}: {full.prefill_ms:.1f} ms prefill, {full.token_ms:.2f} ms per token, "
        f"which is {times(stock.prefill_ratio, invert=True)} and {token} the time without kvprune.",
    ]
