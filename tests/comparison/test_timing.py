"""Timed calls: one call gives both times, ends exactly where it should, and reads no token again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comparison_helpers import small_settings

from kvprune.comparison.data.examples import read_examples
from kvprune.comparison.execution import timing
from kvprune.comparison.execution.batches import load_generator
from kvprune.comparison.execution.first_token import criteria
from kvprune.comparison.execution.generation import Generator
from kvprune.comparison.plan.grid import expand
from kvprune.demo import write_dataset


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    return load_generator(small_settings(tmp_path_factory.mktemp("out")), "pictures")


def test_the_first_token_is_noticed_once_and_nothing_stops() -> None:
    assert criteria(None) == {}
    calls: list[int] = []
    (criterion,) = criteria(lambda: calls.append(1))["stopping_criteria"]
    for _ in range(3):
        stops = criterion(torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 7))
        assert stops.tolist() == [False, False]
    assert calls == [1]


def test_a_lap_is_one_call_of_so_many_steps_and_reads_nothing_again(
    generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "TIMED_TOKENS", 4)
    assert generator.reread, "compare reads the last prompt token again, but not in timed calls"
    write_dataset(tmp_path / "data", tasks=("read",), per_task=2, seed=0)
    inputs = generator.encode(read_examples(tmp_path / "data" / "data.jsonl"))
    steps: list[int] = []
    hook = generator.model.model.register_forward_hook(lambda *_: steps.append(1))
    laps = 0

    def lap() -> None:
        nonlocal laps
        laps += 1

    try:
        configurations = expand(["trim"], [0.5])
        rows = list(timing.measure(generator, inputs, configurations, repetitions=[0, 1], seed=0, on_lap=lap))
    finally:
        hook.remove()
    runners = 1 + len(configurations)  # the untouched model, too
    assert laps == 3 * runners, "a warm-up of one token, then two repetitions"
    assert len(steps) == runners * (1 + 2 * 4)
    assert [row["repetition"] for row in rows] == [0, 1]
    for row in rows:
        for first, whole in (row["stock"], *row["policies"].values()):
            assert 0 < first < whole
