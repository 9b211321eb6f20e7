"""Steps after a call that was broken off in its steps, and steps of two models in two threads."""

from __future__ import annotations

import copy
import threading
from contextlib import suppress

import pytest
import torch
from families import MODELS, inputs_of, model_of
from generation import generate
from step_policies import Hashes, Remembers
from stepping import recorded
from transformers.generation.streamers import BaseStreamer

import kvprune

POLICIES = (
    kvprune.get_policy("quest:keep_ratio=0.4,page=2"),
    kvprune.get_policy("h2o:keep_ratio=0.4,steps=4"),
    kvprune.get_policy("attnpred:keep_ratio=0.4,predictor=ema,interval=3,block=2"),
    kvprune.get_policy("divprune:keep_ratio=0.6 then quest:keep_ratio=0.5,page=2"),
    kvprune.get_policy("divprune:keep_ratio=0.6 then h2o:keep_ratio=0.5,steps=4"),
    Hashes(),
    Remembers(least=2),
)


class Breaks(BaseStreamer):
    """A streamer that raises when it gets the third token, after two decode steps."""

    def __init__(self, error):
        self.error, self.seen = error, 0

    def put(self, value):
        self.seen += 1
        if self.seen == 4:  # the prompt comes first
            raise self.error

    def end(self):
        """Nothing to do."""


def break_in_a_streamer(model, inputs, error):
    one = {name: tensor[:1] for name, tensor in inputs.items()}  # a streamer takes one sample
    with pytest.raises(error):
        generate(model, one, streamer=Breaks(error))


def break_in_a_layer(model, inputs, error):
    """The last layer of the third call, so that layers before it have taken that step."""
    layers = getattr(model.get_decoder(), "layers", None) or model.model.language_model.layers
    calls = []

    def hook(*_):
        calls.append(0)
        if len(calls) == 3:
            raise error

    handle = layers[-1].register_forward_hook(hook)
    try:
        with pytest.raises(error):
            generate(model, inputs)
    finally:
        handle.remove()


def require_fresh(found, run, wanted):
    """The same as in a block of its own: tokens, logits, what each step reads, and the receipt."""
    sequences, logits, fresh = wanted
    assert torch.equal(found[0], sequences)
    assert torch.equal(found[1], logits)
    assert run.selections == fresh.selections
    assert run.report.steps == fresh.report.steps
    for got, expected in zip(list(run.step_reads)[-len(fresh.step_reads) :], fresh.step_reads, strict=True):
        assert got.layer_idx == expected.layer_idx
        assert torch.equal(got.columns, expected.columns)


@pytest.mark.parametrize("error", [KeyboardInterrupt, pytest.param(MemoryError, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("family", "break_off"),
    [
        ("BART", break_in_a_streamer),
        pytest.param("BART", break_in_a_layer, marks=pytest.mark.slow),
        ("Mllama", break_in_a_layer),
        pytest.param("Mllama", break_in_a_streamer, marks=pytest.mark.slow),
        pytest.param("Whisper", break_in_a_layer, marks=pytest.mark.slow),
    ],
)
def test_the_call_after_an_interrupted_one_is_fresh(family, break_off, error):
    model, inputs = model_of(family), inputs_of(family)
    for policy in POLICIES:
        wanted = recorded(model, inputs, policy)
        with kvprune.compress(model, policy) as run:
            run.record_steps()
            break_off(model, inputs, error)
            require_fresh(generate(model, inputs), run, wanted)  # in the same block
        with suppress(error), kvprune.compress(model, policy):
            break_off(model, inputs, error)
            raise error  # leaves the block
        found = recorded(model, inputs, policy)  # in a block of its own
        require_fresh(found, found[2], wanted)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", MODELS)
def test_steps_so_far_count_where_a_call_was_broken_off(family):
    model, inputs = model_of(family), inputs_of(family)
    with kvprune.compress(model, POLICIES[0]) as run:
        break_in_a_layer(model, inputs, KeyboardInterrupt)
        assert {receipt.steps for receipt in run.report.steps} == {2}  # each layer has attended in the third
        assert 0 < run.report.read_fraction < 1


@pytest.mark.parametrize("policy", [POLICIES[1], POLICIES[3]], ids=lambda policy: str(policy.spec))
def test_two_models_take_steps_in_two_threads(policy):
    """Each thread has its own model; one policy serves both."""
    families = ("BART", "Mllama")
    wanted = {family: recorded(model_of(family), inputs_of(family), policy) for family in families}
    models = {family: copy.deepcopy(model_of(family)) for family in families}
    found, start = {family: [] for family in families}, threading.Barrier(len(families))

    def answer(family):
        start.wait()
        with kvprune.compress(models[family], policy) as run:
            for _ in range(3):
                run.record_steps()
                found[family].append((generate(models[family], inputs_of(family)), run.report.steps))

    threads = [threading.Thread(target=answer, args=(family,)) for family in families]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for family in families:
        sequences, logits, run = wanted[family]
        assert len(found[family]) == 3
        for (got, apart, _), steps in found[family]:
            assert torch.equal(got, sequences)
            assert torch.equal(apart, logits)
            assert steps == run.report.steps
