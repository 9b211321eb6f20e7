"""Summarises measured times: how fast each configuration is relative to the full cache."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvprune.comparison.plan.grid import REFERENCE
from kvprune.comparison.storage.timings import Lap

__all__ = ["Ratio", "Speed", "speeds"]


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of times, taken within each repetition; below 1 is faster than the full cache.

    Attributes:
        median: median over repetitions.
        low: lower quartile.
        high: upper quartile.
    """

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """How fast one configuration is.

    Attributes:
        prefill_ms: median milliseconds until the first token of the batch.
        token_ms: median milliseconds per later token of the batch.
        prefill_ratio: time until the first token, relative to the full cache under kvprune.
        token_ratio: time per later token, relative to the full cache; None where in no repetition both times
            could be told from that of prefill.
        guide_ratio: time of the guide's pass, relative to a whole answer of the full cache; None where there
            was no guide. The pass is a part of the time until the first token.
        guide_bytes: most bytes of cross-attention cache that the guide held for one example.
    """

    prefill_ms: float
    token_ms: float
    prefill_ratio: Ratio
    token_ratio: Ratio | None
    guide_ratio: Ratio | None = None
    guide_bytes: int = 0


def speeds(laps: Mapping[int, Mapping[str | None, Lap]]) -> dict[str | None, Speed]:
    """Return the speed of each configuration by spec, that of the untouched model under None.

    Args:
        laps: Times by repetition and spec. Repetitions may time different configurations; each times the full
            cache, and ratios are taken within a repetition.
    """
    names = dict.fromkeys(name for one in laps.values() for name in one)
    return {
        name: _speed([(one[name], one[REFERENCE]) for one in laps.values() if name in one]) for name in names
    }


def _speed(pairs: Sequence[tuple[Lap, Lap]]) -> Speed:
    tokens = [
        own.per_token / reference.per_token
        for own, reference in pairs
        if min(own.per_token, reference.per_token) > 0  # noise can make the long call the shorter one
    ]
    return Speed(
        prefill_ms=1000 * statistics.median(own.first for own, _ in pairs),
        token_ms=1000 * statistics.median(own.per_token for own, _ in pairs),
        prefill_ratio=_ratio([own.first / reference.first for own, reference in pairs]),
        token_ratio=_ratio(tokens) if tokens else None,
        guide_ratio=_ratio([own.guide / reference.all for own, reference in pairs if own.guide])
        if any(own.guide for own, _ in pairs)
        else None,
        guide_bytes=max(own.guide_bytes for own, _ in pairs),
    )


def _ratio(values: Sequence[float]) -> Ratio:
    if len(values) == 1:
        return Ratio(values[0], values[0], values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Ratio(middle, low, high)
