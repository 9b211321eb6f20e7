"""Notes on differences: to which partner, what holds, and how many examples it takes to see one."""

from __future__ import annotations

from kvprune.comparison.statistics.power import (
    POINTS,
    examples_for_means,
    questions_needed,
    smallest_difference,
)
from kvprune.comparison.statistics.summary import Summary

__all__ = ["difference_notes", "plan_note"]

_ASSUMED = {"pictures": (0.05, 0.1, 0.2), "speech": (0.1, 0.2, 0.4)}
"""Disagreement of two policies that is assumed where nothing is measured yet; see `Contrast.disagreement`."""


def difference_notes(summary: Summary, *, ranked: bool) -> list[str]:
    """Return what has to be said about the differences that the table shows.

    Args:
        summary: What the table shows.
        ranked: Whether the table is ranked.
    """
    found = []
    if ranked:
        by = "right answers" if summary.higher_is_better else "word error rate"
        found.append(f"# is the rank by {by} within a budget; equal ones share it.")
    found += _partner_notes(summary)
    references = dict.fromkeys(row.label for row in summary.rows if row.is_reference)
    if references:
        found.append(
            f"{', '.join(references)}: looks at the full cache's answer before it prunes. It shows what a "
            "budget can hold, is no method, and has no rank; '- answer' is the difference to it."
        )
    if summary.disagreement is not None:
        found.append(_needed_note(summary))
    return found


def plan_note(examples: int, kind: str = "pictures", summary: Summary | None = None) -> str:
    """Return the sentence that says before a run what its number of examples can show.

    Args:
        examples: Examples that will be answered.
        kind: "pictures" or "speech".
        summary: Summary of answers that are there already. Without one, or where it compares nothing, common
            disagreements are assumed.
    """
    unit = "utterances" if kind == "speech" else "questions"
    start = f"With {examples} {unit}, "
    if summary is not None and summary.disagreement is not None:
        needed = ", ".join(f"{summary.needed[str(points)]}" for points in POINTS)
        return (
            f"{start}at the agreement of the answers in this folder ({_agreement(summary)}), a true "
            f"difference of {_points()} needs about {needed} {unit} (80 % power, two-sided 5 %)."
        )
    shares = _ASSUMED[kind]
    if kind == "speech":
        counts = ", ".join(str(examples_for_means(0.05, share)) for share in shares)
        assumed = ", ".join(f"{100 * share:.0f}" for share in shares)
        return (
            f"{start}a true difference of 5 points in word error rate needs about {counts} utterances if the "
            f"difference of single utterances has a standard deviation of {assumed} points (80 % power, "
            "two-sided 5 %)."
        )
    counts = ", ".join(str(questions_needed(0.05, share)) for share in shares)
    found = [smallest_difference(examples, share) for share in shares]
    least = ", ".join("none" if one is None else f"{100 * one:.1f} points" for one in found)
    assumed = ", ".join(f"{100 * share:.0f}" for share in shares)
    return (
        f"{start}the smallest difference that can be shown is {least} if exactly one of two "
        f"policies is right on {assumed} % of them; a difference of 5 points needs about {counts} "
        "(80 % power, two-sided 5 %)."
    )


def _partner_notes(summary: Summary) -> list[str]:
    if summary.partner is None:
        return [f"No row of {summary.against} is in the table, so there is no difference to it."]
    unit = "questions" if summary.kind == "pictures" else "utterances"
    budgeted = any(row.label == summary.partner and row.budget for row in summary.rows)
    same = " at the same budget" if budgeted else ""
    better = "" if summary.higher_is_better else " (negative is better)"
    family = [row.versus_baseline for row in summary.rows if row.versus_baseline and not row.is_reference]
    holding = sum(one.p_adjusted is not None and one.p_adjusted <= 0.05 for one in family)
    found = [
        f"'- {summary.partner}' is the difference to {summary.partner}{same} on the same {unit}, in points"
        f"{better}, with its 95 % paired interval. * marks differences that hold after Holm's correction "
        f"(adjusted p <= 0.05): {holding} of {len(family)}. Intervals are not corrected: of many, some "
        "miss 0 by chance."
    ]
    if len(summary.partner_candidates) > 1:
        found.append(
            f"Careful: {summary.against} names {len(summary.partner_candidates)} rows of each budget "
            f"({', '.join(summary.partner_candidates)}); the first is the partner. A whole label names one."
        )
    if summary.examples <= 5:
        least = 2.0 ** (1 - summary.examples)
        found.append(
            f"Careful: with {summary.examples} {unit} no p-value can be below {least:.2g}, so no difference "
            "can hold, however large."
        )
    return found


def _needed_note(summary: Summary) -> str:
    unit = "questions" if summary.kind == "pictures" else "utterances"
    needed = ", ".join(str(summary.needed[str(points)]) for points in POINTS)
    return (
        f"At the agreement of this table ({_agreement(summary)}), a true difference of {_points()} needs "
        f"about {needed} {unit} (80 % power, two-sided 5 %); there are {summary.examples}."
    )


def _agreement(summary: Summary) -> str:
    share = 100 * (summary.disagreement or 0.0)
    if summary.kind == "pictures":
        return f"in the median, exactly one of a row and its partner is right on {share:.0f} % of questions"
    return f"in the median, the difference of one utterance has a standard deviation of {share:.0f} points"


def _points() -> str:
    *first, last = map(str, POINTS)
    return f"{', '.join(first)} or {last} points"
