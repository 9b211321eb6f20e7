"""How fast each configuration is relative to the full cache: medians over repetitions."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvprune.comparison.plan.grid import REFERENCE
from kvprune.comparison.storage.timings import Lap

__all__ = ["Ratio", "Speed", "speeds"]


@dataclass(frozen=True, slots=True)
class Ratio:
    """Median of paired ratios over repetitions, with quartiles; below 1 is faster than the reference."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Prefill and decoding of one configuration.

    Attributes:
        prefill_ms: median milliseconds until the first token of the batch.
        token_ms: median milliseconds per later token of the batch.
        prefill_ratio: to the full cache under kvprune.
        token_ratio: the same for later tokens; None where the clock could not tell it from prefill.
    """

    prefill_ms: float
    token_ms: float
    prefill_ratio: Ratio
    token_ratio: Ratio | None


def speeds(laps: Mapping[int, Mapping[str | None, Lap]]) -> dict[str | None, Speed]:
    """Summarise repetitions: medians, and medians of ratios that are paired within each repetition."""
    names = list(next(iter(laps.values()), {}))
    return {name: _speed([(one[name], one[REFERENCE]) for one in laps.values()]) for name in names}


def _speed(pairs: Sequence[tuple[Lap, Lap]]) -> Speed:
    tokens = [
        own.per_token / reference.per_token
        for own, reference in pairs
        if min(own.per_token, reference.per_token) > 0
    ]
    return Speed(
        prefill_ms=1000 * statistics.median(own.first for own, _ in pairs),
        token_ms=1000 * statistics.median(own.per_token for own, _ in pairs),
        prefill_ratio=_ratio([own.first / reference.first for own, reference in pairs]),
        token_ratio=_ratio(tokens) if tokens else None,
    )


def _ratio(values: Sequence[float]) -> Ratio:
    if len(values) == 1:
        return Ratio(values[0], values[0], values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Ratio(middle, low, high)
