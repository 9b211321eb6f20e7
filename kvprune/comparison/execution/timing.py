"""Measures how fast each configuration is: same inputs, same process, configurations take turns."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from kvprune.comparison.execution.contrasted import Contrasted
from kvprune.comparison.execution.generation import Generator
from kvprune.comparison.plan.grid import Configuration
from kvprune.comparison.storage.timings import TIMED_TOKENS, Lap, laps_to_row
from kvprune.session.compression import Compression

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
    down, or a cache that a predecessor filled, does not favour one of them. Before the first repetition, each
    of them generates one token, which is not counted. A call is timed end to end, from the prompt to the last
    token: nothing is reused, not even the output of the encoder. No prompt token is read again, since
    that only serves fair answers.

    Args:
        generator: The model.
        inputs: One batch, the same for all.
        configurations: The configurations to time.
        repetitions: Numbers of the repetitions to run.
        seed: Seed for policies that draw at random.
        on_lap: Called after each call, also after those that are not counted.
    """
    guide = None if generator.guide is None else replace(generator.guide, reread=False)
    generator = replace(generator, reread=False, guide=guide)
    runners: list[Configuration | None] = [None, *configurations]
    for repetition in [None, *repetitions] if repetitions else []:  # None is the warm-up
        laps: dict[str | None, Lap] = {}
        for runner in random.Random(repetition).sample(runners, len(runners)):
            who = generator if runner is None else generator.answering(runner)
            policy = nullcontext() if runner is None else generator.compress_for(runner, inputs, seed)
            with policy as run:
                if repetition is None:
                    who.generate(inputs, 1)
                else:
                    laps[None if runner is None else runner.spec] = _lap(who, inputs, run)
            on_lap()
        if repetition is not None:
            yield laps_to_row(repetition, laps)


def _lap(generator: Generator, inputs: Mapping[str, Any], run: Compression | Contrasted | None) -> Lap:
    """Generate `TIMED_TOKENS` tokens; return the seconds until the first one and until the last one.

    The cost of a guide comes from the report of the compression.
    """
    device, times = generator.model.device, list[float]()

    def note() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter())

    note()
    generator.generate(inputs, TIMED_TOKENS, on_first=note)
    note()
    start, first, end = times
    guide = None if run is None else run.report.guide
    if run is None or guide is None:
        return Lap(first - start, end - start)
    samples = len(run.report.kept_per_sample)
    return Lap(first - start, end - start, guide.seconds, guide.bytes_peak // samples)
