"""The encoder runs once for all policies of a batch, and nothing else changes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import pytest
import torch

import kvprune
from kvprune.comparison.execution.encoder_reuse import EncoderReuse
from kvprune.session.registry import find_adapter
from kvprune.testing import mllama_inputs, tiny_bart, tiny_mllama, tiny_whisper

POLICIES = ("full", "trim:keep_ratio=0.3", "random:keep_ratio=0.3,reach=onward", "norm:keep_ratio=0.2")


def sounds(seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"input_features": torch.randn(2, 8, 100, generator=draw)}


def texts(seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 60, (2, 9), generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def pictures(seed: int = 0) -> dict[str, torch.Tensor]:
    return mllama_inputs(["t1ttt", "2ttt"], seed)


FAMILIES = {"whisper": (tiny_whisper, sounds), "bart": (tiny_bart, texts), "mllama": (tiny_mllama, pictures)}


def reuse_of(model: Any) -> EncoderReuse:
    return EncoderReuse.of(find_adapter(model)(model))


def answer(model: Any, policy: str, inputs: Mapping[str, torch.Tensor], reuse: EncoderReuse | None) -> Any:
    """Return new tokens, logits and kept columns."""
    resolved = kvprune.get_policy(policy)
    with torch.inference_mode():
        if reuse is None:
            return generate(model, resolved, inputs)
        with reuse.during(resolved):
            return generate(model, resolved, inputs)


def generate(model: Any, policy: Any, inputs: Mapping[str, torch.Tensor]) -> Any:
    told = {"return_dict_in_generate": True, "output_logits": True}
    with kvprune.compress(model, policy) as run:
        out = model.generate(**inputs, **told, max_new_tokens=6, do_sample=False)
    kept = [run.selections[layer].to_mask() for layer in sorted(run.selections)]
    return [out.sequences, *out.logits, *kept]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_the_same_bit_for_bit(family: str) -> None:
    make, inputs_of = FAMILIES[family]
    model, reuse = make(), reuse_of(make())
    reuse.encoder = reuse_of(model).encoder
    for seed in (0, 1):
        for policy in POLICIES:
            inputs = inputs_of(seed)
            assert same(answer(model, policy, inputs, reuse), answer(model, policy, inputs, None)), policy
    assert (reuse.computed, reuse.reused, reuse.own) == (2, 2 * len(POLICIES) - 2, [])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_encoder_itself_runs_once(family: str) -> None:
    make, inputs_of = FAMILIES[family]
    model = make()
    reuse, calls = reuse_of(model), []
    assert reuse.encoder is not None
    first = next(module for module in reuse.encoder.modules() if not list(module.children()))
    first.register_forward_hook(lambda *_: calls.append(1))
    for policy in POLICIES:
        answer(model, policy, inputs_of(), reuse)
    once = len(calls)
    answer(model, "full", inputs_of(), None)
    assert len(calls) == 2 * once


@pytest.mark.parametrize("place", [0, -1])
def test_other_inputs_are_computed_anew(place: int) -> None:
    model = tiny_whisper()
    reuse, inputs = reuse_of(model), sounds()
    answer(model, "full", inputs, reuse)
    inputs["input_features"].view(-1)[place] += 1.0  # the same tensor with another value
    changed = answer(model, "full", inputs, reuse)
    assert (reuse.computed, reuse.reused) == (2, 0)
    assert same(changed, answer(model, "full", inputs, None))
    answer(model, "full", {"input_features": inputs["input_features"][:1]}, reuse)
    assert (reuse.computed, reuse.reused) == (3, 0)


def test_only_the_latest_output_is_held_and_can_be_dropped() -> None:
    model = tiny_whisper()
    reuse = reuse_of(model)
    for seed in (0, 1, 0):
        answer(model, "full", sounds(seed), reuse)
    assert (reuse.computed, reuse.reused) == (3, 0)
    reuse.forget()
    answer(model, "full", sounds(0), reuse)
    assert (reuse.computed, reuse.reused) == (4, 0)


@pytest.mark.parametrize("policy", ["visionzip:keep_ratio=0.5", "prumerge:keep_ratio=0.5"])
def test_policies_that_look_inside_run_the_encoder_themselves(policy: str) -> None:
    model, inputs = tiny_mllama(), pictures()
    reuse = reuse_of(model)
    for _ in range(2):
        answer(model, "full", inputs, reuse)
        assert same(answer(model, policy, inputs, reuse), answer(model, policy, inputs, None))
    assert reuse.own == [str(kvprune.get_policy(policy).spec)]
    assert (reuse.computed, reuse.reused) == (1, 1)


def state(module: torch.nn.Module) -> list[Any]:
    return [sorted(vars(module)), module.forward, inspect.signature(module.forward)]


@pytest.mark.parametrize("replaced_before", [False, True])
def test_the_model_is_as_before_also_after_an_exception(replaced_before: bool) -> None:
    model = tiny_whisper()
    reuse = reuse_of(model)
    encoder = reuse.encoder
    assert encoder is not None
    if replaced_before:  # as accelerate does
        encoder.forward = type(encoder).forward.__get__(encoder)
    before = state(encoder)
    with reuse.during(kvprune.get_policy("full")):
        assert inspect.signature(encoder.forward) == before[-1]
        assert encoder.forward != before[1]
    assert state(encoder) == before
    with pytest.raises(ZeroDivisionError), reuse.during(kvprune.get_policy("full")):
        _ = 1 / 0
    assert state(encoder) == before


def test_an_encoder_that_fails_leaves_nothing_behind() -> None:
    model = tiny_whisper()
    reuse = reuse_of(model)
    with pytest.raises(ValueError, match="length"), reuse.during(kvprune.get_policy("full")), torch.no_grad():
        model.get_encoder()(torch.zeros(1, 8, 99))
    assert (reuse.computed, reuse.reused) == (0, 0)


def test_training_and_gradients_are_left_alone() -> None:
    model = tiny_whisper()
    reuse = reuse_of(model)
    with reuse.during(kvprune.get_policy("full")):
        for _ in range(2):
            model.get_encoder()(**sounds()).last_hidden_state.sum().backward()
        model.train()
        with torch.no_grad():
            model.get_encoder()(**sounds())
    assert (reuse.computed, reuse.reused) == (0, 0)


def test_a_model_whose_adapter_names_no_encoder_runs_as_before() -> None:
    reuse = EncoderReuse(None)
    with reuse.during(kvprune.get_policy("full")):
        pass
    assert (reuse.computed, reuse.reused, reuse.own) == (0, 0, [])


def test_what_a_caller_writes_to_an_output_is_not_remembered() -> None:
    model = tiny_whisper()
    reuse = reuse_of(model)
    with reuse.during(kvprune.get_policy("full")), torch.no_grad():
        first = model.get_encoder()(**sounds())
        first["last_hidden_state"] = first.last_hidden_state.repeat_interleave(2, 0)
        second = model.get_encoder()(**sounds())
    assert reuse.reused == 1
    assert second.last_hidden_state.shape[0] == 2
