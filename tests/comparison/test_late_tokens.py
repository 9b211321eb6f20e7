"""Prompts whose last tokens are decoded after pruning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison_helpers import small_settings

import kvprune
from kvprune.comparison import compare, verify
from kvprune.comparison.data.examples import Example, read_examples
from kvprune.comparison.execution.generation import Generator
from kvprune.comparison.execution.late_tokens import divide
from kvprune.errors import DataError, KVPruneError, ResultsError, UnsupportedModelError
from kvprune.testing import masked_oracle, mllama_inputs


def generator(late: int) -> Generator:
    plain = {"device": "cpu", "dtype": "auto", "attn_implementation": None, "max_new_tokens": 4}
    return Generator.load(None, late_tokens=late, **plain)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> tuple[Example, ...]:
    """Questions of different length, so that a batch of them is padded."""
    from kvprune import demo

    folder = tmp_path_factory.mktemp("late") / "data"
    demo.write_dataset(folder, tasks=("read", "count", "row"), per_task=3, seed=0)
    return read_examples(folder / "data.jsonl")


@pytest.fixture(scope="module")
def by_late() -> dict[int, Generator]:
    return {late: generator(late) for late in (0, 1, 3)}


def answers(of: Generator, inputs: Any, spec: str | None, seed: int = 0) -> list[str]:
    if spec is None:
        return of.texts(of.generate(inputs))
    with kvprune.compress(of.model, spec, seed=seed):
        return of.texts(of.generate(inputs))


@pytest.mark.parametrize("late", [1, 3])
@pytest.mark.parametrize("spec", [None, "full", "lossless"])
def test_without_pruning_it_changes_no_answer(
    by_late: dict[int, Generator], examples: tuple[Example, ...], late: int, spec: str | None
) -> None:
    inputs = by_late[0].encode(examples)
    assert not inputs["attention_mask"].all(), "some prompts are padded"
    assert answers(by_late[late], inputs, spec) == answers(by_late[0], inputs, None)


@pytest.mark.parametrize("spec", ["norm:keep_ratio=0.1", "trim:keep_ratio=0.1", "random:keep_ratio=0.1"])
def test_a_batch_answers_as_each_sample_alone(
    by_late: dict[int, Generator], examples: tuple[Example, ...], spec: str
) -> None:
    of = by_late[1]
    together = answers(of, of.encode(examples), spec)
    assert together == [answers(of, of.encode([one]), spec)[0] for one in examples]


def test_the_first_answer_token_shows_what_was_dropped_after_prefill(
    by_late: dict[int, Generator], examples: tuple[Example, ...]
) -> None:
    inputs, spec = by_late[0].encode(examples), "uniform:keep_tokens=1"
    first = {late: by_late[late].generate(inputs, 1) for late in (0, 1)}
    assert torch.equal(first[0], first[1])
    pruned = {}
    for late in (0, 1):
        with kvprune.compress(by_late[late].model, spec):
            pruned[late] = by_late[late].generate(inputs, 1)
    assert torch.equal(pruned[0], first[0]), "prefill is over before anything is dropped"
    assert not torch.equal(pruned[1], first[0])


@pytest.mark.parametrize("spec", ["norm:keep_ratio=0.1", "norm:keep_ratio=0.1,reach=onward"])
def test_it_generates_what_the_masked_model_does(
    by_late: dict[int, Generator], examples: tuple[Example, ...], spec: str
) -> None:
    of = by_late[3]
    inputs = of.encode(examples)
    with kvprune.compress(of.model, spec) as run:
        found = of.generate(inputs)
    assert run.report.prefills == 1
    assert len(run.report.kept_per_sample) == len(examples)
    with masked_oracle(of.model, run.selections, run.prefill_selections):
        assert torch.equal(of.generate(inputs), found)


def test_prompts_are_divided_after_the_picture() -> None:
    inputs = mllama_inputs(["t4tt", "1t"])
    early, late = divide(inputs, 1)
    assert torch.equal(early["input_ids"], inputs["input_ids"][:, :-1])
    assert early["cross_attention_mask"].shape[1] == early["attention_mask"].shape[1] == 3
    assert torch.equal(early["pixel_values"], inputs["pixel_values"])
    assert set(late) == {"input_ids", "attention_mask", "cross_attention_mask"}
    assert torch.equal(late["input_ids"], inputs["input_ids"])
    for too_many in (2, 4, 9):
        with pytest.raises(DataError, match=f"late_tokens is {too_many}, but .* only 2 tokens from its"):
            divide(inputs, too_many)


def test_inputs_that_nobody_knows_are_refused() -> None:
    inputs = mllama_inputs(["t4tt"])
    with pytest.raises(UnsupportedModelError, match="also reads 'speaker': use late_tokens=0"):
        divide({**inputs, "speaker": torch.zeros(1)}, 1)
    with pytest.raises(UnsupportedModelError, match="token_type_ids has 9 entries for 4 tokens"):
        divide({**inputs, "token_type_ids": torch.zeros(1, 9)}, 1)


def test_comparisons_remember_it(tmp_path: Path) -> None:
    settings = small_settings(tmp_path / "out", late_tokens=1, repetitions=0)
    done = compare(["norm", "trim"], [0.25], settings)
    assert done.late_tokens == 1
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["run"]["late_tokens"] == 1
    assert verify(tmp_path / "out", sample=None).reproduces
    with pytest.raises(ResultsError, match="late_tokens was 1 and is now 0"):
        compare(["norm", "trim"], [0.25], small_settings(tmp_path / "out", repetitions=0))
    with pytest.raises(KVPruneError, match="late_tokens is -1; it must be at least 0"):
        small_settings(tmp_path / "out", late_tokens=-1)


def test_a_prompt_that_is_too_short_is_named_before_anything_is_answered(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="late_tokens is 50, but a prompt of this batch has only"):
        compare(["trim"], [0.25], small_settings(tmp_path / "out", late_tokens=50))
    assert not (tmp_path / "out" / "results.jsonl").exists()
