"""The numbers of the page, as docs/evidence.json holds them: the page is made from them alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvprune.comparison.statistics.rank_agreement import Scores
from kvprune.errors import ResultsError

STORED = Path(__file__).parents[2] / "docs" / "evidence.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A rate or a difference with its 95 % interval, as fractions; `holds`: after Holm's correction."""

    value: float
    low: float
    high: float
    holds: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """One policy at one budget.

    Attributes:
        label: its spec without the budget.
        name: its name.
        keep_ratio: the requested fraction; None where it has no budget.
        kept: the fraction that decoding reads: what was kept, or for a policy that chooses in each decode
            step the mean of what its steps read.
        rate: right answers, or for speech the word error rate.
        tasks: the same by task.
        reference: whether it looks at the answer.
        reads_prompt: whether it declares that it needs something that depends on the prompt.
        published: whether it comes from a paper.
        misses_budget: whether it kept noticeably more or less than asked.
        loops: endless repetitions among the transcripts; 0 for pictures.
        versus_full: difference to the full cache.
        versus_answer: difference to answer-attention at the same budget.
        versus_random: difference to random at the same budget.
        steps: whether it chooses in each decode step what is read.
        contrast: whether the full cache answers beside the pruned one (`kvprune.contrast`).
    """

    label: str
    name: str
    keep_ratio: float | None
    kept: float
    rate: Estimate
    tasks: Mapping[str, float]
    reference: bool
    reads_prompt: bool
    published: bool
    misses_budget: bool
    loops: int
    versus_full: Estimate | None
    versus_answer: Estimate | None
    versus_random: Estimate | None
    steps: bool = False
    contrast: bool = False

    @property
    def ranked(self) -> bool:
        """Whether it can be ranked at its budget."""
        competes = not self.reference and not self.contrast and not self.misses_budget
        return self.keep_ratio is not None and competes


@dataclass(frozen=True, kw_only=True)
class Contest:
    """The best policy that reads the prompt, and the best that does not, at one budget.

    Attributes:
        keep_ratio: the budget.
        reading: label of the best one that reads the prompt.
        blind: label of the best one that does not.
        difference: the rate of the first minus that of the second, paired.
    """

    keep_ratio: float
    reading: str
    blind: str
    difference: Estimate


@dataclass(frozen=True, kw_only=True)
class EvidenceSet:
    """One set of results: what was planned (see `PlannedSet`), what was found, and where it comes from.

    Attributes:
        kind: "pictures" or "speech".
        examples: number of questions or utterances.
        tasks: number of examples of each task.
        chance: share of the most frequent right answer, by task; empty for speech.
        languages: languages of the recordings.
        draws: seeds of each policy that draws.
        reread: whether the last token of each prompt was read again.
        left_out: built-in policies with a keep ratio that are not in the table, and why if that is known.
        questions_digest: what identifies the questions.
        made: model, data, machine, versions and date, by name.
        contests: best policies with and without the prompt, the largest budget first.
        rows: all rows, the full cache first.
    """

    key: str
    title: str
    about: str
    asks: bool
    commands: tuple[str, ...]
    prepare: tuple[str, ...]
    figure: str
    aims: bool
    same_questions_as: str
    note: str
    kind: str
    examples: int
    tasks: Mapping[str, int]
    chance: Mapping[str, float]
    languages: tuple[str, ...]
    draws: int
    reread: bool
    left_out: Mapping[str, str]
    questions_digest: str
    made: Mapping[str, str]
    contests: tuple[Contest, ...]
    rows: tuple[Row, ...]

    @property
    def speech(self) -> bool:
        """Whether rates are word error rates, of which lower ones are better."""
        return self.kind == "speech"

    @property
    def full(self) -> Row:
        """The full cache."""
        return self.rows[0]

    @property
    def ratios(self) -> tuple[float, ...]:
        """All budgets, the largest first."""
        return tuple(
            sorted({row.keep_ratio for row in self.rows if row.keep_ratio is not None}, reverse=True)
        )

    def at(self, ratio: float) -> dict[str, Row]:
        """Return the rows of one budget by label."""
        return {row.label: row for row in self.rows if row.keep_ratio == ratio}

    def gain(self, difference: float) -> float:
        """Return a difference of rates so that positive is better."""
        return -difference if self.speech else difference

    def badness(self, row: Row) -> float:
        """Return a number that is lower for better rows."""
        return -self.gain(row.rate.value)

    def scores(self) -> Scores:
        """Return what rankings are made of: `badness` by budget and label, of rows that can be ranked."""
        found: dict[float, dict[str, float]] = {}
        for row in self.rows:
            if row.ranked and row.keep_ratio is not None:
                found.setdefault(row.keep_ratio, {})[row.label] = self.badness(row)
        return found

    def ranks(self, ratio: float) -> dict[str, int]:
        """Return the rank of each policy at one budget: 1 is the best, and equal ones share a rank."""
        scores = self.scores().get(ratio, {})
        return {label: 1 + sum(other < own for other in scores.values()) for label, own in scores.items()}


def to_json(sets: Mapping[str, EvidenceSet]) -> str:
    """Return the content of docs/evidence.json: one line for each row, so that changes can be read."""

    def line(value: object) -> str:
        return json.dumps(_rounded(value), ensure_ascii=False)

    parts = []
    for key, one in sets.items():
        fields = asdict(one)
        rows = ",\n   ".join(line(row) for row in fields.pop("rows"))
        said = ",\n  ".join(f"{json.dumps(name)}: {line(value)}" for name, value in fields.items())
        parts.append(f' {json.dumps(key)}: {{\n  {said},\n  "rows": [\n   {rows}\n  ]\n }}')
    body = ",\n".join(parts)
    return f'{{"format": {FORMAT}, "sets": {{\n{body}\n}}}}\n'


def from_json(text: str) -> dict[str, EvidenceSet]:
    """Read what `to_json` wrote.

    Raises:
        ResultsError: If it was written in another format.
    """
    whole = json.loads(text)
    if whole.get("format") != FORMAT:
        raise ResultsError(f"docs/evidence.json has format {whole.get('format')}, but {FORMAT} is read here")
    return {key: _set(one) for key, one in whole["sets"].items()}


def _set(given: dict[str, Any]) -> EvidenceSet:
    return EvidenceSet(
        **{
            **given,
            **{name: tuple(given[name]) for name in ("commands", "prepare", "languages")},
            "contests": tuple(Contest(**{**one, **_estimates(one)}) for one in given["contests"]),
            "rows": tuple(Row(**{**one, **_estimates(one)}) for one in given["rows"]),
        }
    )


def _estimates(given: dict[str, Any]) -> dict[str, Estimate]:
    return {
        name: Estimate(**value)
        for name, value in given.items()
        if isinstance(value, dict) and set(value) == {"value", "low", "high", "holds"}
    }


def _rounded(value: Any) -> Any:
    """Round fractions to six digits: more than any table shows."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value
