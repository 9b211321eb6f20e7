"""`compress`: what it accepts and refuses, attaching and detaching, what it reports."""

from __future__ import annotations

import copy

import pytest
import torch
from generation import bart, generate, mllama
from torch import nn

import kvprune
from kvprune.adapters.mllama import MllamaAdapter
from kvprune.adapters.probes import Probe
from kvprune.errors import (
    BudgetError,
    CompressionStateError,
    IncompatibleTransformersError,
    NestedCompressionError,
    PolicyOptionError,
    UnknownPolicyError,
    UnsupportedModelError,
)
from kvprune.testing import mllama_inputs


def test_a_model_without_an_adapter_is_refused_with_the_supported_ones():
    with pytest.raises(UnsupportedModelError, match=r"Linear; supported: .*MllamaForConditionalGeneration"):
        kvprune.compress(nn.Linear(2, 2), "lossless")
    with pytest.raises(UnsupportedModelError, match="MllamaTextModel"):
        kvprune.compress(mllama().model.language_model, "lossless")


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("trimm", UnknownPolicyError, "did you mean 'trim'"),
        ("trim:keep=0.5", PolicyOptionError, "has no option 'keep'"),
        ("trim:k_ratio=1.5", BudgetError, "1.5"),
        ("random:keep_ratio=0", BudgetError, "got 0"),
        ("random:keep_ratio=nan", PolicyOptionError, "nan"),
        ("random:keep_ratio=0.5,keep_tokens=3", BudgetError, "keep_tokens=3"),
    ],
)
def test_bad_specs_fail_before_anything_is_attached(spec, error, message):
    with pytest.raises(error, match=message):
        kvprune.compress(mllama(), spec)
    assert not mllama()._forward_pre_hooks


def test_an_adapter_that_lost_its_footing_refuses(monkeypatch):
    lost = [Probe("MllamaModel", False, "forward lacks cross_attention_mask")]
    monkeypatch.setattr(MllamaAdapter, "probe", classmethod(lambda cls: lost))
    with pytest.raises(
        IncompatibleTransformersError, match="MllamaModel: forward lacks cross_attention_mask"
    ):
        kvprune.compress(mllama(), "lossless")


def test_an_instance_a_spec_and_text_are_the_same():
    inputs, policy = mllama_inputs(["tt4ttt"]), kvprune.get_policy("random:keep_ratio=0.3")
    kept = []
    for given in (policy, policy.spec, "random:keep_ratio=0.3", "random:keep_ratio=0.3;reach=layer"):
        with kvprune.compress(mllama(), given, seed=4) as run:
            generate(mllama(), inputs, steps=1)
        kept.append(run.selections)
    assert kept[0] == kept[1] == kept[2] == kept[3]


def test_attach_and_detach_for_long_lived_use():
    run = kvprune.compress(mllama(), "trim").attach()
    assert run.is_attached
    with pytest.raises(CompressionStateError, match="attached already"):
        run.attach()
    for _ in range(2):
        generate(mllama(), mllama_inputs(["tt4ttt"]), steps=2)
    run.detach()
    run.detach()  # harmless
    assert not run.is_attached
    assert run.report.prefills == 2
    run.check_ran()
    generate(mllama(), mllama_inputs(["tt4ttt"]), steps=2)
    assert run.report.prefills == 2
    with run:
        generate(mllama(), mllama_inputs(["tt4ttt"]), steps=2)
    assert run.report.prefills == 3


def test_two_compressions_of_one_model_are_refused_also_of_its_parts():
    model = mllama()
    with (
        kvprune.compress(model, "lossless"),
        pytest.raises(NestedCompressionError, match="MllamaModel is being compressed already"),
    ):
        kvprune.compress(model.model, "trim").attach()
    with kvprune.compress(model, "lossless"), kvprune.compress(bart(), "lossless"):
        pass  # two models do not disturb each other


def test_a_copy_of_a_compressed_model_is_free_and_can_be_compressed():
    model, inputs = mllama(), mllama_inputs(["tt4ttt"])
    _, stock, _ = generate(model, inputs)
    with kvprune.compress(model, "trim:keep_ratio=0.25") as run:
        _, expected, _ = generate(model, inputs)
        twin = copy.deepcopy(model)
        assert torch.equal(generate(twin, inputs)[1], stock)
        with kvprune.compress(twin, "trim:keep_ratio=0.25") as other:
            assert torch.equal(generate(twin, inputs)[1], expected)
        assert run.report.prefills == other.report.prefills == 1
    assert torch.equal(generate(twin, inputs)[1], stock)


def test_the_report_is_what_was_measured():
    inputs = mllama_inputs(["tt4ttt", "t1tt", "tttt"])
    with kvprune.compress(mllama(), "norm:keep_ratio=0.5", seed=7) as run:
        assert run.report.kept_fraction != run.report.kept_fraction  # NaN: nothing ran yet
        assert "nothing compressed yet" in str(run.report)
        _, _, cache = generate(mllama(), inputs, steps=2)
    report = run.report
    first, second, third = report.kept_per_sample
    assert (first, second) == (0.5, 0.6)  # 10 of 20, 3 of 5
    assert third != third  # sees no image
    assert report.kept_fraction == pytest.approx(0.55)
    layers = [cache.layers[layer_idx] for layer_idx in (1, 3, 5)]
    assert report.bytes_held == sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert report.bytes_of_bookkeeping == sum(layer.slots.nbytes + layer.valid.nbytes for layer in layers)
    data = report.to_dict()
    assert data["spec"] == "norm:keep_ratio=0.5"
    assert data["seed"] == 7
    assert data["kept_per_sample"][2] is None
    assert [layer["layer_idx"] for layer in data["layers"]] == [1, 3, 5]
    assert "kept 55.0% of visible image tokens" in str(report)


def test_selections_say_what_prefill_and_decode_used():
    with kvprune.compress(mllama(), "trim:keep_ratio=0.25") as run:
        assert run.selections == {}
        _, _, cache = generate(mllama(), mllama_inputs(["tt4ttt"]), steps=2)
    assert run.prefill_selections[1] is None  # the deciding layer attended to all
    assert run.prefill_selections[3] == run.selections[3] == run.selections[1]
    assert torch.equal(cache.layers[3].slots, run.selections[3].indices)


def test_a_probe_that_raises_is_a_typed_error(monkeypatch):
    monkeypatch.setattr(MllamaAdapter, "probe", classmethod(lambda cls: 1 / 0))
    with pytest.raises(IncompatibleTransformersError, match="probe: raised ZeroDivisionError"):
        kvprune.compress(mllama(), "full")
