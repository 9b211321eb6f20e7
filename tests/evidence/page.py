"""The text of docs/evidence.md. Whatever it says about a method is computed from the numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from evidence.checks import aims, below_random
from evidence.numbers import Estimate, EvidenceSet, Row
from evidence.origin import limits, origin
from evidence.wording import cell, code_list, difference, names, order, percent, share, table, tau
from kvprune.comparison.statistics.rank_agreement import rank_agreements
from kvprune.errors import ResultsError

_HEAD = """# Evidence: which method is better, on which model

`python tests/evidence_page.py` writes this page from results folders of [`kvprune compare`](compare.md). All
numbers are in [evidence.json](evidence.json). Whatever the page says about a method is computed from them.
At the end stand the [commands](#commands-machines-and-versions), and
[what the page does not show](#what-this-page-does-not-show).

**Two regimes.** A prompt can ask for something in particular, or not. A question about a picture names what
matters, and a policy that reads the prompt can keep it. The prompt of speech recognition says only in which
language to write; all of the recording matters. Each regime is measured, because a method can be good in one
and bad in the other.
"""

_READING = """## How to read the tables

* A policy **reads the prompt** if it declares in `needs` that it needs `queries`, `text`, `guidance` or
  `question`. What all others see comes from the encoder, which has not seen the prompt.
* A cell has the rate in per cent, its 95 % interval, and in parentheses the rank at this budget. Equal
  policies share a rank. Rows stand in the order of their mean rank.
* A budget is the share of visible tokens that is kept, or read in a step. Where a policy kept another share,
  by more than three points, the cell says how much instead of a rank: it cannot be compared with others at
  this budget.
* A policy that chooses **in each step** sees the answer as it grows. Its budget is what a step reads, and the
  cache holds everything, except under `h2o:steps`. It takes no part in the contest of those that read the
  prompt and those that do not.
* Rows with `contrast` run the full cache beside the pruned one ([contrast](contrast.md)). They save nothing,
  and have no rank.
* `full` drops nothing. `answer-attention` looks at the answer of the full cache before it prunes: it is a
  reference and no method, and has no rank.
* Policies ran with their defaults. `norm`, `keydiff`, `h2o` and `snapkv` ran twice: with `reach=onward` one
  decision in the first cross-attention layer holds for all later ones, as in `trim`; with `reach=layer`, the
  default and as published, each layer decides for itself. The name says which. `random` and `uniform` ran
  with `reach=onward`.
* Differences are paired: question by question, or utterance by utterance. Their intervals are not corrected
  for the number of rows. [Statistics](compare.md#statistics) says how intervals are computed.
"""


SMALL = 0.05
"""A loss that the page calls small."""


def render(sets: Mapping[str, EvidenceSet]) -> str:
    """Return the page."""
    lines = [_HEAD, *_regimes(sets), _READING]
    drawn: set[str] = set()
    for one in sets.values():
        lines += [f"## {one.title}", ""]
        if one.figure not in drawn:
            beside = [other.title for other in sets.values() if other.figure == one.figure]
            lines += [f"![{'; '.join(beside)}](evidence_{one.figure}.png)", ""]
            drawn.add(one.figure)
        lines += _section(one)
    lines += [*_agreement(sets), *origin(sets), *limits(sets)]
    return "\n".join(lines).rstrip("\n") + "\n"


def _regimes(sets: Mapping[str, EvidenceSet]) -> list[str]:
    """Return which sets are of which regime, and who leads in each."""
    lines = []
    for asks, what in ((True, "The prompt asks"), (False, "The prompt does not ask")):
        titles = [one.title for one in sets.values() if one.asks is asks]
        if titles:
            lines.append(f"* {what}: {'; '.join(titles)}.")
    rows = [row for one in sets.values() for row in _contest_rows(one)]
    headings = [
        "set",
        "budget",
        "best that reads the prompt",
        "best that does not",
        "lead of the first [95 %]",
    ]
    lines += ["", *table(headings, rows, left=4), ""]
    lines += [
        "The lead is in points, and positive where the policy that reads the prompt is better (more right",
        "answers, or fewer wrong words). Both were chosen as the best of several, and intervals do not count",
        "that. Policies that kept another share than asked take no part.",
        *_leads(sets),
        "",
    ]
    return lines


def _contest_rows(one: EvidenceSet) -> Iterator[list[str]]:
    for found in one.contests:
        low, high = sorted((one.gain(found.difference.low), one.gain(found.difference.high)))
        lead = Estimate(value=one.gain(found.difference.value), low=low, high=high)
        best = [_best(one, found.keep_ratio, label) for label in (found.reading, found.blind)]
        yield [one.title, share(found.keep_ratio), *best, difference(lead)]


def _best(one: EvidenceSet, ratio: float, label: str) -> str:
    """Return a best policy with its rate, and how many others of its kind are as good."""
    own = one.at(ratio)[label]
    others = sum(
        row.ranked and row.reads_prompt == own.reads_prompt and row.rate.value == own.rate.value
        for row in one.at(ratio).values()
    )
    more = f" and {others - 1} more" if others > 1 else ""
    return f"`{names(row.label for row in one.rows)[label]}`{more}, {percent(own.rate.value)}"


def _leads(sets: Mapping[str, EvidenceSet]) -> Iterator[str]:
    """Count in how many sets of each regime the policy that reads the prompt leads at the smaller budgets."""
    ratios = sorted({found.keep_ratio for one in sets.values() for found in one.contests}, reverse=True)
    for ratio in (one for one in ratios if one <= 0.1):
        said = []
        for asks, where in ((True, "where the prompt asks"), (False, "where it does not")):
            of = [one for one in sets.values() if one.asks is asks]
            leads = [
                one.gain(found.difference.value) > 0
                for one in of
                for found in one.contests
                if found.keep_ratio == ratio
            ]
            if leads:
                said.append(f"in {sum(leads)} of {len(leads)} sets {where}")
        yield f"At {share(ratio)}, a policy that reads the prompt leads {' and '.join(said)}."


def _section(one: EvidenceSet) -> list[str]:
    unit = "utterances" if one.speech else "questions"
    sizes = ", ".join(f"{task} {count}" for task, count in one.tasks.items())
    asked = f"{one.examples} {unit}" + (f" ({sizes})" if len(one.tasks) > 1 else "")
    metric = "Word error rate in per cent; lower is better." if one.speech else "Right answers in per cent."
    lines = [" ".join(filter(None, [one.about, f"{asked}.", metric, one.note])), ""]
    lines += [*_main_table(one), "", *_sentences(one), "", *_differences(one), ""]
    if len(one.tasks) > 1:
        lines += [*_by_task(one), ""]
    if one.aims:
        lines += ["What this set is meant to show:", "", *(f"* {line}" for line in aims(one)), ""]
    return lines


def _main_table(one: EvidenceSet) -> list[str]:
    shown = names(row.label for row in one.rows)
    ranks = {ratio: one.ranks(ratio) for ratio in one.ratios}
    rows = [
        [f"`{shown[row.label]}`", "-", *(cell(one, row, None) for _ in one.ratios)]
        for row in _unbudgeted(one)
    ]
    for label in order(one):
        at = [one.at(ratio).get(label) for ratio in one.ratios]
        cells = [cell(one, row, ranks[ratio].get(label)) for ratio, row in zip(one.ratios, at, strict=True)]
        reads = any(row.reads_prompt for row in at if row)
        rows.append([f"`{shown[label]}`", _sees(at, reads), *cells])
    for label in _references(one):
        cells = [cell(one, one.at(ratio).get(label), None) for ratio in one.ratios]
        rows.append([f"*`{shown[label]}`* (reference)", "answer", *cells])
    headings = ["policy", "reads the prompt", *(f"{share(ratio)} kept" for ratio in one.ratios)]
    return table(headings, rows, left=2)


def _sees(at: Sequence[Row | None], reads: bool) -> str:
    """Return what a policy sees of the text: the prompt, each step, or nothing."""
    if any(row.steps for row in at if row):
        return "in each step"
    return "yes" if reads else "no"


def _unbudgeted(one: EvidenceSet) -> list[Row]:
    return [row for row in one.rows if row.keep_ratio is None and not row.reference]


def _references(one: EvidenceSet) -> list[str]:
    return list(dict.fromkeys(row.label for row in one.rows if row.reference))


def _sentences(one: EvidenceSet) -> list[str]:
    """Return who loses little, who is worse than random, who repeats itself, and who is missing."""
    said = [_safe(one)]
    if not one.aims and any(row.versus_random for row in one.rows):
        worse = "; ".join(
            f"{code_list(worse)} at {share(ratio)}" for ratio in one.ratios if (worse := _below(one, ratio))
        )
        said.append(f"Worse than `random` at the same budget: {worse or 'none'}.")
    endless = []
    for ratio in one.ratios:
        at = [row for row in one.at(ratio).values() if not row.reference]
        if any(row.loops for row in at):
            endless.append(f"{sum(row.loops > 0 for row in at)} of {len(at)} at {share(ratio)}")
    if endless:
        said.append(f"Policies with endless repetitions in a transcript: {', '.join(endless)}.")
    if one.left_out:
        why = (f"`{name}`{f' ({reason})' if reason else ''}" for name, reason in one.left_out.items())
        said.append(f"Not in the table: {'; '.join(why)}.")
    return "\n\n".join(said).split("\n")


def _safe(one: EvidenceSet) -> str:
    shown, found = names(row.label for row in one.rows), []
    for ratio in one.ratios:
        safe = [
            shown[label]
            for label in order(one)
            if (row := one.at(ratio).get(label)) is not None and row.ranked and row.versus_full is not None
            if min(one.gain(row.versus_full.low), one.gain(row.versus_full.high)) > -SMALL
        ]
        if safe:
            found.append(f"at {share(ratio)} {code_list(safe)}")
    what = f"Lose less than {100 * SMALL:.0f} points against `full`, at the worse end of the interval, too"
    return f"{what}: {'; '.join(found) or 'no policy at any budget'}."


def _below(one: EvidenceSet, ratio: float) -> list[str]:
    shown = names(row.label for row in one.rows)
    return [shown[row.label] for row in below_random(one, published=False) if row.keep_ratio == ratio]


def _differences(one: EvidenceSet) -> list[str]:
    """Return the differences to answer-attention, folded away."""
    shown = names(row.label for row in one.rows)
    if not any(row.versus_answer for row in one.rows):
        return []
    rows = []
    for label in order(one):
        cells = [one.at(ratio).get(label) for ratio in one.ratios]
        rows.append(
            [
                f"`{shown[label]}`",
                *(difference(row.versus_answer) if row and row.versus_answer else "" for row in cells),
            ]
        )
    better = "negative is better" if one.speech else "positive is better"
    head = f"Difference to <code>answer-attention</code> at the same budget, in points [95 %]; {better}"
    headings = ["policy", *(f"{share(ratio)} kept" for ratio in one.ratios)]
    return ["<details>", f"<summary>{head}</summary>", "", *table(headings, rows), "", "</details>"]


def _by_task(one: EvidenceSet) -> list[str]:
    """Return the rates by task at a quarter and a tenth, in one table."""
    ratios = [ratio for ratio in (0.25, 0.1) if ratio in one.ratios]
    if not ratios:
        return []
    shown, tasks = names(row.label for row in one.rows), list(one.tasks)

    def cells(rows: Sequence[Row | None], task: str) -> str:
        return " / ".join("-" if row is None else f"{100 * row.tasks[task]:.0f}" for row in rows)

    lines = [["`full`", *(cells([one.full], task) for task in tasks)]]
    if one.chance:
        lines.insert(0, ["*chance*", *(f"{100 * one.chance[task]:.0f}" for task in tasks)])
    for label in [*order(one), *_references(one)]:
        rows = [one.at(ratio).get(label) for ratio in ratios]
        lines.append([f"`{shown[label]}`", *(cells(rows, task) for task in tasks)])
    said = f"By task, at {' / '.join(map(share, ratios))}"
    said += "; *chance* is always giving the most frequent right answer of the task:" if one.chance else ":"
    return [said, "", *table(["policy", *tasks], lines)]


def _agreement(sets: Mapping[str, EvidenceSet]) -> list[str]:
    """Return Kendall's tau of each pair of sets."""
    ratios = sorted({ratio for one in sets.values() for ratio in one.ratios}, reverse=True)
    rows, trained_twice = [], []
    for first, second in itertools.combinations(sets.values(), 2):
        try:
            found = {one.keep_ratio: one for one in rank_agreements(first.scores(), second.scores())}
        except ResultsError:  # no budget in common
            continue
        cells = [tau(found[ratio]) if ratio in found else "" for ratio in (*ratios, None)]
        rows.append([first.title, second.title, *cells])
        if second.same_questions_as == first.key and None in found:
            trained_twice.append(f"* {first.title} and {second.title}: {tau(found[None])} by mean rank.")
    if not rows:
        return []
    lines = ["## Do the rankings agree?", "", *_TAU, ""]
    lines += [*table(["", "", *map(share, ratios), "mean rank"], rows, left=2), ""]
    if trained_twice:
        said = "The same questions, asked of models that were trained independently:"
        lines += [said, "", *trained_twice, ""]
    return lines


_TAU = (
    "Kendall's tau-b of the rankings of two sets: 1 is the same order, 0 no relation, -1 the reverse. n is",
    "the number of policies that are ranked in both, p the two-sided p-value of no relation. *mean rank*:",
    "policies are ranked by the mean of their ranks over all budgets that both sets have.",
    "`kvprune results tau A B` prints the same for two results folders.",
)
