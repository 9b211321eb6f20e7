"""Measuring one decision: what is counted, what is printed, what is refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import kvprune
from kvprune.cli import app
from kvprune.errors import KVPruneError, PolicyFailedError
from kvprune.testing.cost import (
    LLAMA_11B,
    PeakMemory,
    ask,
    make_problem,
    measure,
    measure_all,
    peak_memory,
)

SMALL = dataclasses.replace(LLAMA_11B, tiles=2, patches=5, rows=3, query_heads=4, kv_heads=2, width=8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hungry(kvprune.ScoringPolicy):
    """Holds two tensors of known size at once, and a third one after they are gone."""

    name = "hungry"
    fails: bool = False

    def score(self, view: kvprune.LayerView) -> torch.Tensor:
        if self.fails:
            raise RuntimeError("no appetite")
        first = torch.ones(1000, dtype=torch.float64)
        second = first + 1
        view_of_it = second[:10]
        del first, second, view_of_it
        return torch.ones(1500, dtype=torch.float64)[:10].view(1, 1, 10)


def test_peak_counts_what_is_alive_at_once() -> None:
    def work() -> None:
        first = torch.ones(1000, dtype=torch.float64)
        second = first * 2  # 16000 bytes are alive here
        third = second[:500].view(5, 100)  # and no more here
        del first, second
        torch.ones(500, dtype=torch.float64).add_(third.sum())

    with PeakMemory() as memory:
        work()
    assert memory.peak == 16_000
    assert memory.largest == 8_000
    assert memory.alive == 0
    assert peak_memory(work) == 16_000


def test_what_was_there_before_does_not_count() -> None:
    before = torch.ones(1000)
    assert peak_memory(lambda: before[:10].view(2, 5)) == 0
    assert peak_memory(lambda: before + 1) == 4_000


def test_a_decision_is_measured_with_what_it_holds() -> None:
    found = measure(Hungry(), SMALL, dtype=torch.float32, repetitions=1)
    assert (found.spec, found.dtype) == ("hungry:keep_ratio=0.5", "float32")
    assert 16_000 <= found.peak_bytes <= 20_000
    assert 0 < found.seconds < 10


def test_a_step_is_measured_with_what_it_prepares_and_the_copy_of_what_it_reads() -> None:
    def peak(spec: str) -> int:
        return measure(kvprune.get_policy(spec), dtype=torch.bfloat16, repetitions=0).peak_bytes

    entry = 2 * 8 * 128 * 2  # bytes of a key and a value, all heads
    bounds = 2 * 401 * 8 * 128 * 2  # a lower and an upper bound for each of 401 pages
    whole, half = peak("quest:keep_ratio=1"), peak("quest:keep_ratio=0.5")
    assert whole >= bounds
    assert half >= bounds + 3202 * entry
    assert peak("quest:keep_ratio=0.1") < half
    assert peak("h2o:steps=4") > 0


@pytest.mark.parametrize("spec", ["trim", "norm:of=raw_keys", "uniform", "full"])
def test_problems_have_the_dimensions_and_what_the_policy_needs(spec: str) -> None:
    policy = kvprune.get_policy(spec)
    view = make_problem(policy, dtype=torch.bfloat16)
    assert list(view.keys.shape) == list(view.values.shape) == [1, 8, 6404, 128]
    assert view.keys.dtype == torch.bfloat16
    assert not torch.equal(view.keys, view.values)
    assert list(view.visible.shape) == [1, 6404]
    assert view.visible.all()
    assert int(view.live.sum()) == 64
    assert (view.captured.queries is not None) == ("queries" in policy.needs)
    assert (view.captured.raw_keys is not None) == ("raw_keys" in policy.needs)


def test_the_same_seed_gives_the_same_problem_and_decision() -> None:
    policy = kvprune.get_policy("trim:keep_ratio=0.3")
    one, other = (ask(policy, make_problem(policy, SMALL, seed=seed)) for seed in (1, 1))
    assert isinstance(one, kvprune.Decision)
    assert isinstance(other, kvprune.Decision)
    assert one.onward is not None
    assert other.onward is not None
    assert torch.equal(one.onward.indices, other.onward.indices)


def test_a_report_says_where_and_when() -> None:
    seen: list[tuple[int, int]] = []
    policies = [kvprune.get_policy("norm"), kvprune.get_policy("full")]
    report = measure_all(policies, dimensions=SMALL, on_progress=lambda *at: seen.append(at))
    assert [(one.spec, one.dtype) for one in report.measurements] == [
        ("norm:keep_ratio=0.5", "bfloat16"),
        ("norm:keep_ratio=0.5", "float32"),
        ("full", "bfloat16"),
        ("full", "float32"),
    ]
    assert seen == [(done, 4) for done in range(5)]
    assert report.versions["torch"] == torch.__version__
    assert json.loads(json.dumps(report.to_dict()))["dimensions"]["rows"] == 3


def test_bad_requests_are_typed() -> None:
    with pytest.raises(KVPruneError, match="repetitions is -1; it must be at least 0"):
        measure_all([kvprune.get_policy("full")], repetitions=-1, dimensions=SMALL)
    with pytest.raises(PolicyFailedError, match=r"policy hungry:.* cannot decide: RuntimeError: no appetite"):
        measure_all([Hungry(fails=True)], dimensions=SMALL)


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", "memory", *arguments], env={"COLUMNS": "200"})


def test_command_prints_a_table_or_json() -> None:
    chosen = ["--policy", "uniform:keep_ratio=0.1", "--policy", "random", "--repetitions", "1"]
    table = command(*chosen)
    assert table.exit_code == 0, table.output
    (row,) = (line for line in table.stdout.splitlines() if line.startswith("uniform:keep_ratio=0.1 "))
    assert len(row.split()) == 5
    assert "6404 encoder tokens, 64 text rows" in table.stdout
    found = json.loads(command(*chosen, "--json").stdout)
    assert len(found["measurements"]) == 4
    assert found["device"] == "cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "unknown device 'tpu'; choose cpu or cuda"),
        (["--policy", "trimm"], "unknown policy 'trimm'; did you mean 'trim'"),
        (["--policy", "full", "--repetitions", "-1"], "repetitions is -1"),
    ],
)
def test_command_refuses_by_name(arguments: list[str], message: str) -> None:
    done = command(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_named() -> None:
    done = command("--device", "cuda", "--policy", "full")
    assert done.exit_code == 2
    assert "device is 'cuda', but PyTorch sees no CUDA device; use cpu" in done.stderr


@pytest.mark.gpu
def test_cuda_counts_at_least_what_storages_hold() -> None:
    policy = kvprune.get_policy("trim")
    problem = make_problem(policy, device="cuda")
    counted = peak_memory(lambda: ask(policy, problem), "cuda")
    with PeakMemory() as memory:
        ask(policy, problem)
    assert memory.peak <= counted <= 2 * memory.peak + 2**25


def test_nothing_is_timed_with_no_repetitions() -> None:
    found = measure(kvprune.get_policy("norm"), SMALL, repetitions=0)
    assert found.seconds is None
    assert found.peak_bytes > 0
