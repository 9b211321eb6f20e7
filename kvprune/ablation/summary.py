"""Statistics of a comparison: accuracy with intervals, agreement, kept tokens, bytes and speed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvprune.ablation.answers import Answer
from kvprune.ablation.data import Example, is_correct, normalise
from kvprune.ablation.grid import REFERENCE, Configuration
from kvprune.ablation.timing import Lap, Speed, speeds

__all__ = ["Rate", "Row", "Summary", "rate", "summarise"]


@dataclass(frozen=True, slots=True)
class Rate:
    """A share of examples with its 95 % Wilson interval, as fractions.

    Attributes:
        value: hits divided by total.
        low: lower end of the interval.
        high: upper end of the interval.
        hits: examples that count.
        total: all examples.
    """

    value: float
    low: float
    high: float
    hits: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One configuration.

    Attributes:
        spec: canonical spec of the policy.
        label: the spec without its budget.
        budget: the requested budget as text, empty where the policy has none.
        keep_ratio: the requested fraction of visible tokens, where the budget is one.
        reach: the policy's option of this name, where it has one.
        kept_fraction: fraction of visible tokens kept, measured, mean over examples.
        bytes_held: cross-attention cache of one example in bytes, measured, mean over examples.
        bytes_full: the same in stock transformers.
        accuracy: share of right answers.
        tasks: the same by task.
        agreement: share of answers equal to those of the full cache.
        lost: examples that the full cache answers rightly and this configuration does not.
        gained: the reverse.
        p_value: exact two-sided McNemar test of lost against gained.
        unfinished: answers that were cut at the limit on new tokens.
        speed: None where nothing was timed.
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
    unfinished: int
    speed: Speed | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A whole comparison.

    Attributes:
        rows: one per configuration, the reference first.
        tasks: names of the tasks, in data order.
        examples: number of examples.
        constant_answer: share of right answers if the most frequent answer of each task were always given.
        stock: speed of the untouched model; None where nothing was timed.
        repetitions: repetitions of the timing.
        batch_size: examples per call of `generate`.
        device: where it ran.
    """

    rows: tuple[Row, ...]
    tasks: tuple[str, ...]
    examples: int
    constant_answer: Mapping[str, float]
    stock: Speed | None
    repetitions: int
    batch_size: int
    device: str

    @property
    def reference(self) -> Row:
        """The row of the full cache."""
        return self.rows[0]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data: what summary.json holds."""
        return asdict(self)


def rate(hits: int, total: int) -> Rate:
    """Return hits of total with the 95 % Wilson score interval.

    Raises:
        ValueError: If total is below 1 or hits is not in 0..total.
    """
    from scipy.stats import binomtest

    if not 0 <= hits <= total or total < 1:
        raise ValueError(f"a rate needs 0 <= hits <= total and total >= 1, got {hits} of {total}")
    interval = binomtest(hits, total).proportion_ci(confidence_level=0.95, method="wilson")
    return Rate(hits / total, float(interval.low), float(interval.high), hits, total)


def summarise(
    configurations: Sequence[Configuration],
    examples: Sequence[Example],
    answers: Mapping[tuple[str, str], Answer],
    laps: Mapping[int, Mapping[str | None, Lap]],
    *,
    batch_size: int,
    device: str,
) -> Summary:
    """Turn finished answers and timings into a summary; the same input always gives the same summary.

    Args:
        configurations: The reference and all others.
        examples: What was asked.
        answers: By spec and example id, complete.
        laps: By repetition and spec; empty if nothing was timed.
        batch_size: Examples per call of `generate`.
        device: Where it ran.
    """
    tasks = tuple(dict.fromkeys(example.task for example in examples))
    timed = speeds(laps)
    full = [answers[REFERENCE, example.id] for example in examples]
    rows = tuple(
        _row(one, [answers[one.spec, example.id] for example in examples], full, tasks, timed.get(one.spec))
        for one in configurations
    )
    return Summary(
        rows=rows,
        tasks=tasks,
        examples=len(examples),
        constant_answer={task: _constant([e for e in examples if e.task == task]) for task in tasks},
        stock=timed.get(None),
        repetitions=len(laps),
        batch_size=batch_size,
        device=device,
    )


def _row(
    one: Configuration,
    own: Sequence[Answer],
    full: Sequence[Answer],
    tasks: Sequence[str],
    speed: Speed | None,
) -> Row:
    lost = sum(before.correct and not after.correct for before, after in zip(full, own, strict=True))
    gained = sum(after.correct and not before.correct for before, after in zip(full, own, strict=True))
    return Row(
        spec=one.spec,
        label=one.label,
        budget=one.budget,
        keep_ratio=one.keep_ratio,
        reach=one.reach,
        kept_fraction=sum(answer.kept_fraction for answer in own) / len(own),
        bytes_held=sum(answer.bytes_held for answer in own) / len(own),
        bytes_full=sum(answer.bytes_full for answer in own) / len(own),
        accuracy=_share(answer.correct for answer in own),
        tasks={task: _share(answer.correct for answer in own if answer.task == task) for task in tasks},
        agreement=_share(answer.agrees_with_full for answer in own),
        lost=lost,
        gained=gained,
        p_value=_mcnemar(lost, gained),
        unfinished=sum(not answer.finished for answer in own),
        speed=speed,
    )


def _share(hits: Iterable[bool]) -> Rate:
    counted = list(hits)
    return rate(sum(counted), len(counted))


def _mcnemar(lost: int, gained: int) -> float:
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def _constant(examples: Sequence[Example]) -> float:
    """Accuracy of always giving the answer that is right most often."""
    candidates = Counter(
        answer for example in examples for answer in {normalise(text) for text in example.answers}
    )
    best, _ = candidates.most_common(1)[0]
    return sum(is_correct(best, example.answers) for example in examples) / len(examples)
