"""How fast each configuration is, measured side by side: same inputs, same process, taking turns."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import kvprune
from kvprune.ablation.generation import Generator
from kvprune.ablation.grid import REFERENCE, Configuration
from kvprune.errors import ResultsError

__all__ = ["TIMED_TOKENS", "Lap", "Ratio", "Speed", "measure", "read_laps", "speeds"]

TIMED_TOKENS = 64
"""Tokens of a timed answer: the first one is prefill, the others are decoding."""

_LONGEST = 1e9
"""Seconds; what is longer is damage, not patience."""


@dataclass(frozen=True, slots=True)
class Lap:
    """Seconds of two calls of `generate`, one after the other.

    Attributes:
        first: for one new token.
        all: for `TIMED_TOKENS` new tokens.
    """

    first: float
    all: float

    @property
    def per_token(self) -> float:
        """Seconds per token after the first."""
        return (self.all - self.first) / (TIMED_TOKENS - 1)


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


def measure(
    generator: Generator,
    inputs: Mapping[str, Any],
    configurations: Sequence[Configuration],
    *,
    repetitions: Sequence[int],
    seed: int,
    on_lap: Callable[[], None],
) -> Iterator[dict[str, Any]]:
    """Time the untouched model and every configuration, one row for timings.jsonl per repetition.

    Within a repetition all take turns, in an order drawn anew each time, so drifts of the machine and what a
    neighbour leaves behind hit all alike. One round that is not counted comes first.

    Args:
        generator: The model.
        inputs: One batch, the same for all.
        configurations: What to time.
        repetitions: Numbers of the repetitions to run.
        seed: For policies that draw.
        on_lap: Called after each pair of timed calls, also in the uncounted round.
    """
    runners: list[Configuration | None] = [None, *configurations]
    for repetition in [None, *repetitions] if repetitions else []:
        laps: dict[str | None, Lap] = {}
        for runner in random.Random(repetition).sample(runners, len(runners)):
            if runner is None:
                laps[None] = _lap(generator, inputs)
            else:
                with kvprune.compress(generator.model, runner.policy, seed=seed):
                    laps[runner.spec] = _lap(generator, inputs)
            on_lap()
        if repetition is not None:
            timed = {spec: [lap.first, lap.all] for spec, lap in laps.items() if spec is not None}
            stock = laps[None]
            yield {"repetition": repetition, "stock": [stock.first, stock.all], "policies": timed}


def read_laps(
    where: str, rows: Sequence[Mapping[str, Any]], specs: Sequence[str]
) -> dict[int, dict[str | None, Lap]]:
    """Return laps by repetition and spec, those of the untouched model under None.

    Raises:
        ResultsError: If a row is damaged or times other configurations.
    """
    found: dict[int, dict[str | None, Lap]] = {}
    for number, row in enumerate(rows, start=1):
        try:
            repetition, policies = row["repetition"], row["policies"]
            if isinstance(repetition, bool) or not isinstance(repetition, int) or repetition in found:
                raise ValueError(f"repetition is {repetition!r:.40}")
            if set(policies) != set(specs):
                raise ValueError("it times other configurations")
            laps: dict[str | None, Lap] = {None: _read_lap(row["stock"])}
            found[repetition] = laps | {spec: _read_lap(policies[spec]) for spec in specs}
        except (KeyError, TypeError, ValueError) as error:
            raise ResultsError(f"{where}, line {number} is damaged ({error!r}); delete this line") from error
    return found


def _read_lap(value: object) -> Lap:
    if (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(one, float | int) and not isinstance(one, bool) for one in value)
        and all(0 < one < _LONGEST for one in value)
    ):
        return Lap(*value)
    raise ValueError(f"{value!r:.40} is no pair of seconds")


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


def _lap(generator: Generator, inputs: Mapping[str, Any]) -> Lap:
    return Lap(_seconds(generator, inputs, 1), _seconds(generator, inputs, TIMED_TOKENS))


def _seconds(generator: Generator, inputs: Mapping[str, Any], tokens: int) -> float:
    device = generator.model.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    generator.generate(inputs, tokens)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
