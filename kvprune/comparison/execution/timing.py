"""Measures how fast each configuration is: same inputs, same process, configurations take turns."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from kvprune.comparison.execution.generation import Generator
from kvprune.comparison.plan.grid import Configuration
from kvprune.comparison.storage.timings import TIMED_TOKENS, Lap, laps_to_row

__all__ = ["measure"]


def measure(
    generator: Generator,
    inputs: Mapping[str, Any],
    configurations: Sequence[Configuration],
    *,
    repetitions: Sequence[int],
    seed: int,
    on_lap: Callable[[], None],
) -> Iterator[dict[str, Any]]:
    """Time the untouched model and every configuration; yield a row of timings.jsonl for each repetition.

    Within a repetition each of them runs once, in an order drawn anew each time, so that a machine that slows
    down, or a cache that a predecessor filled, does not favour one of them. A warm-up round comes first and
    is not counted.

    Args:
        generator: The model.
        inputs: One batch, the same for all.
        configurations: The configurations to time.
        repetitions: Numbers of the repetitions to run.
        seed: Seed for policies that draw at random.
        on_lap: Called after each pair of timed calls, in the warm-up round, too.
    """
    runners: list[Configuration | None] = [None, *configurations]
    for repetition in [None, *repetitions] if repetitions else []:  # None is the warm-up round
        laps: dict[str | None, Lap] = {}
        for runner in random.Random(repetition).sample(runners, len(runners)):
            if runner is None:
                laps[None] = _lap(generator, inputs)
            else:
                with generator.compress(runner.policy, inputs, seed):
                    laps[runner.spec] = _lap(generator, inputs)
            on_lap()
        if repetition is not None:
            yield laps_to_row(repetition, laps)


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
