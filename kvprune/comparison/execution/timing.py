"""How fast each configuration is, measured side by side: same inputs, same process, taking turns."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from kvprune.comparison.execution.generation import Generator
from kvprune.comparison.plan.grid import Configuration
from kvprune.comparison.storage.timings import TIMED_TOKENS, Lap
from kvprune.session.compression import compress

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
                with compress(generator.model, runner.policy, seed=seed):
                    laps[runner.spec] = _lap(generator, inputs)
            on_lap()
        if repetition is not None:
            timed = {spec: [lap.first, lap.all] for spec, lap in laps.items() if spec is not None}
            stock = laps[None]
            yield {"repetition": repetition, "stock": [stock.first, stock.all], "policies": timed}


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
