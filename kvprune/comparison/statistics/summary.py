"""Summarises a comparison: accuracy with intervals, agreement, kept tokens, bytes and speed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvprune.comparison.data.examples import Example, is_correct, normalise
from kvprune.comparison.plan.grid import REFERENCE, Configuration
from kvprune.comparison.statistics.paired import PairedDifference, paired_difference
from kvprune.comparison.statistics.rates import Rate, share
from kvprune.comparison.statistics.speed import Speed, speeds
from kvprune.comparison.storage.answers import Answer, Key
from kvprune.comparison.storage.timings import Lap

__all__ = ["Row", "Summary", "summarise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The results of one configuration.

    Attributes:
        spec: canonical spec of the policy.
        label: the spec without its budget.
        budget: the requested budget as text; empty where the policy has none.
        keep_ratio: the requested fraction of visible tokens; None where the budget is not a fraction.
        reach: the policy's option `reach`; None where it has no such option.
        kept_fraction: measured fraction of visible tokens kept, mean over examples.
        bytes_held: measured size of the cross-attention cache of one example in bytes, mean over examples.
        bytes_full: its size in stock transformers.
        accuracy: share of right answers.
        tasks: share of right answers by task.
        agreement: share of answers equal to those of the full cache.
        lost: examples that the full cache answers rightly and this configuration does not.
        gained: examples that this configuration answers rightly and the full cache does not.
        p_value: p-value of the exact two-sided McNemar test of `lost` against `gained`.
        versus_baseline: accuracy minus that of `Summary.against` at the same keep ratio, on the same
            questions; None where there is no such row, and for that row itself.
        unfinished: number of answers that were cut at the limit on new tokens.
        speed: measured times; None where nothing was timed.
    """

    spec: str
    label: str
    budget: str
    keep_ratio: float | None
    reach: str | None
    kept_fraction: float
    bytes_held: float
    bytes_full: float
    accuracy: Rate
    tasks: Mapping[str, Rate]
    agreement: Rate
    lost: int
    gained: int
    p_value: float
    versus_baseline: PairedDifference | None
    unfinished: int
    speed: Speed | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The results of a whole comparison.

    Attributes:
        rows: one row per configuration, the full cache first.
        tasks: names of the tasks, in the order of the data.
        examples: number of examples.
        constant_answer: share of right answers if the most frequent answer of each task were always given.
        stock: speed of the untouched model; None where nothing was timed.
        repetitions: repetitions of the timing.
        batch_size: examples per call of `generate`.
        device: the torch device.
        reread: whether the last token of each prompt was read again from the pruned cache.
        against: label of the policy that others are compared with at the same budget.
    """

    rows: tuple[Row, ...]
    tasks: tuple[str, ...]
    examples: int
    constant_answer: Mapping[str, float]
    stock: Speed | None
    repetitions: int
    batch_size: int
    device: str
    reread: bool
    against: str

    @property
    def reference(self) -> Row:
        """The row of the full cache."""
        return self.rows[0]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data: what summary.json holds."""
        return asdict(self)


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

    Args:
        configurations: The full cache and all other configurations.
        examples: The questions.
        answers: Answers by spec, seed and example id; none may be missing.
        laps: Times by repetition and spec; empty if nothing was timed.
        batch_size: Examples per call of `generate`.
        device: The torch device.
        reread: Whether the last token of each prompt was read again from the pruned cache.
        against: Label of the policy that others are compared with at the same budget.
    """
    tasks = tuple(dict.fromkeys(example.task for example in examples))
    timed = speeds(laps)
    given = {
        one.spec: [answers[one.spec, None, example.id] for example in examples] for one in configurations
    }
    baselines: dict[float | None, list[Answer]] = {
        one.keep_ratio: given[one.spec]
        for one in configurations
        if one.label == against and one.keep_ratio is not None
    }
    rows = tuple(
        _row(
            one, given[one.spec], given[REFERENCE], baselines.get(one.keep_ratio), tasks, timed.get(one.spec)
        )
        for one in configurations
    )
    return Summary(
        rows=rows,
        tasks=tasks,
        examples=len(examples),
        constant_answer={
            task: _constant([example for example in examples if example.task == task]) for task in tasks
        },
        stock=timed.get(None),
        repetitions=len(laps),
        batch_size=batch_size,
        device=device,
        reread=reread,
        against=against,
    )


def _row(
    one: Configuration,
    own: Sequence[Answer],
    full: Sequence[Answer],
    baseline: Sequence[Answer] | None,
    tasks: Sequence[str],
    speed: Speed | None,
) -> Row:
    changes = Counter((before.correct, after.correct) for before, after in zip(full, own, strict=True))
    lost, gained = changes[True, False], changes[False, True]
    return Row(
        spec=one.spec,
        label=one.label,
        budget=one.budget,
        keep_ratio=one.keep_ratio,
        reach=one.reach,
        kept_fraction=sum(answer.kept_fraction for answer in own) / len(own),
        bytes_held=sum(answer.bytes_held for answer in own) / len(own),
        bytes_full=sum(answer.bytes_full for answer in own) / len(own),
        accuracy=share(answer.correct for answer in own),
        tasks={task: share(answer.correct for answer in own if answer.task == task) for task in tasks},
        agreement=share(answer.agrees_with_full for answer in own),
        lost=lost,
        gained=gained,
        p_value=_mcnemar(lost, gained),
        versus_baseline=None if baseline is None or own is baseline else _difference(own, baseline),
        unfinished=sum(not answer.finished for answer in own),
        speed=speed,
    )


def _difference(own: Sequence[Answer], other: Sequence[Answer]) -> PairedDifference:
    return paired_difference([answer.correct for answer in own], [answer.correct for answer in other])


def _mcnemar(lost: int, gained: int) -> float:
    """Return the p-value of the exact two-sided McNemar test."""
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def _constant(examples: Sequence[Example]) -> float:
    """Return the accuracy of always giving the answer that is right most often, 0..1."""
    candidates = Counter(
        answer for example in examples for answer in {normalise(text) for text in example.answers}
    )
    best, _ = candidates.most_common(1)[0]
    return sum(is_correct(best, example.answers) for example in examples) / len(examples)
