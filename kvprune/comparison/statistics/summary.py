"""Summarises a comparison: the metric with intervals, differences, kept tokens, bytes and speed."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from kvprune.comparison.data.examples import Example, Kind, is_correct, normalise
from kvprune.comparison.plan.grid import ANSWER_ATTENTION, REFERENCE, Configuration
from kvprune.comparison.statistics.columns import Columns, columns, drawn_seeds
from kvprune.comparison.statistics.contrasts import Contrast, accuracy_contrast, error_contrast
from kvprune.comparison.statistics.error_rates import ErrorRates
from kvprune.comparison.statistics.multiple import holm
from kvprune.comparison.statistics.partner import partner_label, partners, self_guided
from kvprune.comparison.statistics.power import POINTS, examples_for_means, questions_needed
from kvprune.comparison.statistics.rates import mean_rate
from kvprune.comparison.statistics.row import Row
from kvprune.comparison.statistics.speed import Speed, speeds
from kvprune.comparison.storage.answers import Answer, Key
from kvprune.comparison.storage.timings import Lap
from kvprune.errors import ResultsError

__all__ = ["Metric", "Row", "Summary", "summarise"]

Metric = Literal["accuracy", "word_error_rate"]
"""What rows are ranked and compared by."""

_ROUNDING = 1e-9
"""Fractions that differ by less are equal."""

_WINDOW_SECONDS = 30.0
"""Whisper's encoder always reads a window of this length, padded with silence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The results of a whole comparison.

    Attributes:
        kind: what was asked: questions about pictures, or recordings to write down.
        metric: what rows are ranked and compared by.
        higher_is_better: whether a larger value of the metric is better.
        window_seconds: seconds of sound that the encoder reads, which budgets are fractions of; None for
            pictures.
        rows: one row per configuration, the full cache first.
        tasks: names of the tasks, in the order of the data.
        task_sizes: number of examples of each task.
        examples: number of examples.
        constant_answer: share of right answers if the most frequent answer of each task were always given;
            empty for speech.
        stock: speed of the untouched model; None where nothing was timed.
        repetitions: repetitions of the timing.
        batch_size: examples per call of `generate`.
        device: the torch device.
        reread: whether the last token of each prompt was read again from the pruned cache.
        against: name or label that was asked for, of the policy that others are compared with.
        partner: label of that policy in this table; None where it is not in it.
        partner_candidates: labels that have the name in `against`; the first is the partner.
        disagreement: median of `Contrast.disagreement` over the comparisons with the partner; None where
            there is none.
        needed: examples for 80 % power at that disagreement; see `Contrast.needed`. Empty where there is
            none.
    """

    kind: Kind
    metric: Metric
    higher_is_better: bool
    window_seconds: float | None
    rows: tuple[Row, ...]
    tasks: tuple[str, ...]
    task_sizes: Mapping[str, int]
    examples: int
    constant_answer: Mapping[str, float]
    stock: Speed | None
    repetitions: int
    batch_size: int
    device: str
    reread: bool
    against: str
    partner: str | None
    partner_candidates: tuple[str, ...]
    disagreement: float | None
    needed: Mapping[str, int]

    @property
    def reference(self) -> Row:
        """The row of the full cache."""
        return self.rows[0]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data: what summary.json holds.

        Rows have a `read_fraction` only if their decode steps read less than they keep.
        """
        found = asdict(self)
        for row in found["rows"]:
            if row["read_fraction"] is None:
                del row["read_fraction"]
        return found

    @property
    def reads_less(self) -> bool:
        """Whether decode steps of any row read less than it keeps."""
        return any(row.read_fraction is not None for row in self.rows)


def summarise(
    configurations: Sequence[Configuration],
    examples: Sequence[Example],
    answers: Mapping[Key, Answer],
    laps: Mapping[int, Mapping[str | None, Lap]],
    *,
    batch_size: int,
    device: str,
    reread: bool,
    against: str,
) -> Summary:
    """Summarise finished answers and times; the same input always gives the same summary.

    The order of the examples does not matter, except for the order of the tasks.

    Args:
        configurations: The full cache and all other configurations.
        examples: The questions or utterances.
        answers: Answers by spec, seed and example id; none may be missing.
        laps: Times by repetition and spec; empty if nothing was timed.
        batch_size: Examples per call of `generate`.
        device: The torch device.
        reread: Whether the last token of each prompt was read again from the pruned cache.
        against: Name or label of the policy that others are compared with at the same budget.

    Raises:
        KeyError: If an answer is missing.
        ResultsError: If two transcripts of one utterance were counted against different references.
    """
    tasks = tuple(dict.fromkeys(example.task for example in examples))
    seeds, ids = drawn_seeds(answers), [example.id for example in examples]
    given = {one.spec: columns(answers, one.spec, seeds.get(one.spec, ()), ids) for one in configurations}
    partner = partner_label(configurations, against)
    table = _Table(configurations, examples, tasks, given, partner)
    timed = speeds(laps)
    rows = _adjust([table.row(one, timed.get(one.spec)) for one in configurations])
    contrasts = [row.versus_baseline for row in rows if row.versus_baseline and not row.is_reference]
    middle = statistics.median(one.disagreement for one in contrasts) if contrasts else None
    kind = examples[0].kind
    speech = kind == "speech"
    need = examples_for_means if speech else questions_needed
    return Summary(
        kind=kind,
        metric="word_error_rate" if speech else "accuracy",
        higher_is_better=not speech,
        window_seconds=_WINDOW_SECONDS if speech else None,
        rows=rows,
        tasks=tasks,
        task_sizes={task: sum(example.task == task for example in examples) for task in tasks},
        examples=len(examples),
        constant_answer={}
        if speech
        else {task: _constant([example for example in examples if example.task == task]) for task in tasks},
        stock=timed.get(None),
        repetitions=len(laps),
        batch_size=batch_size,
        device=device,
        reread=reread,
        against=against,
        partner=partner,
        partner_candidates=tuple(
            dict.fromkeys(
                one.label for one in configurations if partner and one.label.partition(":")[0] == against
            )
        )
        if partner != against
        else (),
        disagreement=middle,
        needed={} if middle is None else {str(points): need(points / 100, middle) for points in POINTS},
    )


class _Table:
    """What all rows are computed from.

    Args:
        configurations: All rows.
        examples: All examples, in the order of the arrays.
        tasks: Names of the tasks.
        given: The answers of each configuration by spec.
        partner: Label of the partner.
    """

    def __init__(
        self,
        configurations: Sequence[Configuration],
        examples: Sequence[Example],
        tasks: Sequence[str],
        given: Mapping[str, Columns],
        partner: str | None,
    ) -> None:
        self._given = given
        self._tasks = {
            task: [number for number, example in enumerate(examples) if example.task == task]
            for task in tasks
        }
        self._partners = partners(configurations, partner)
        self._best = partners(configurations, partner_label(configurations, ANSWER_ATTENTION))
        self._self_guided = self_guided(configurations)
        self._errors: ErrorRates | None = None
        if examples[0].kind == "speech":
            _check_references(given)
            order = sorted(range(len(examples)), key=lambda number: examples[number].id)
            self._errors = ErrorRates(given, self._tasks, order)

    def row(self, one: Configuration, speed: Speed | None) -> Row:
        """Return the row of one configuration."""
        own = self._given[one.spec]
        tasks = (
            {task: mean_rate(own.correct[:, numbers]) for task, numbers in self._tasks.items()}
            if self._errors is None
            else self._errors.tasks(one.spec)
        )
        return Row(
            spec=one.spec,
            label=one.label,
            budget=one.budget,
            keep_ratio=one.keep_ratio,
            reach=one.reach,
            is_reference=one.policy.reads_answer,
            guide=one.guide,
            self_guided=self._self_guided.get(one.spec),
            seeds=tuple(seed for seed in own.seeds if seed is not None),
            kept_fraction=float(own.kept.mean()),
            read_fraction=_read(own),
            bytes_held=float(own.held.mean()),
            bytes_full=float(own.stock.mean()),
            accuracy=mean_rate(own.correct),
            speech=None if self._errors is None else self._errors.rates(one.spec),
            tasks=tasks,
            agreement=mean_rate(own.agrees),
            versus_full=self._contrast(one.spec, None if one.spec == REFERENCE else REFERENCE),
            versus_baseline=self._contrast(one.spec, self._partners.get(one.spec)),
            versus_answer_attention=self._contrast(one.spec, self._best.get(one.spec)),
            versus_self_guided=self._contrast(one.spec, self._self_guided.get(one.spec)),
            unfinished=int((1 - own.finished).sum()),
            speed=speed,
            is_contrast=one.contrast is not None,
        )

    def _contrast(self, own: str, other: str | None) -> Contrast | None:
        if other is None:
            return None
        if self._errors is None:
            return accuracy_contrast(self._given[own], self._given[other])
        return error_contrast(
            self._given[own], self._given[other], self._errors.words(own), self._errors.words(other)
        )


def _read(own: Columns) -> float | None:
    """Return what a step reads, as a fraction of visible tokens; None where it is what is kept."""
    kept, read = float(own.kept.mean()), float(own.read.mean())
    return None if math.isclose(kept, read, rel_tol=_ROUNDING) else read


def _adjust(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Return the rows with Holm's p-values: one family for the partner, and one for the full cache."""
    done = list(rows)
    for name in ("versus_baseline", "versus_full"):
        family = [
            (place, contrast)
            for place, row in enumerate(rows)
            if not row.is_reference and (contrast := getattr(row, name)) is not None
        ]
        adjusted = holm([contrast.p_value for _, contrast in family])
        for (place, contrast), p_value in zip(family, adjusted, strict=True):
            changed: dict[str, Any] = {name: replace(contrast, p_adjusted=p_value)}
            done[place] = replace(done[place], **changed)
    return tuple(done)


def _check_references(given: Mapping[str, Columns]) -> None:
    """Raise if the references of two configurations differ in their number of words or characters."""
    known = next(iter(given.values())).speech
    for spec, one in given.items():
        if one.speech is None or known is None:
            raise ResultsError(f"answers of {spec!r} are no transcripts, but the examples are utterances")
        for name in ("words", "characters"):
            if (getattr(one.speech, name) != getattr(known, name)[0]).any():
                raise ResultsError(
                    f"transcripts of {spec!r} were counted against references with another number of {name} "
                    "than those of the full cache"
                )


def _constant(examples: Sequence[Example]) -> float:
    """Return the accuracy of always giving the answer that is right most often, 0..1."""
    candidates = Counter(
        answer for example in examples for answer in {normalise(text) for text in example.answers}
    )
    best, _ = candidates.most_common(1)[0]
    return sum(is_correct(best, example.answers) for example in examples) / len(examples)
