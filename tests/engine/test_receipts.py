"""Receipts of real runs: bytes, peak, time, decisions, warnings, and the second look at the live cache."""

from __future__ import annotations

import copy
import gc
import json
from dataclasses import dataclass

import pytest
import torch
from generation import bart, generate, mllama

import kvprune
from kvprune.errors import PolicyFailedError, ReceiptError
from kvprune.testing import mllama_inputs

LAYERS = (1, 3, 5)
BATCH = ["tt4ttt", "t1tt", "tt2tttt"]


def run_with(spec, batch=BATCH, **options):
    with kvprune.compress(mllama(), spec) as run:
        cache = generate(mllama(), mllama_inputs(batch), steps=2, **options)[2]
    return run.report, cache


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
@pytest.mark.parametrize("spec", ["full", "lossless", "norm:keep_ratio=0.3", "trim:keep_ratio=0.3"])
def test_verify_finds_what_the_receipt_says(spec, options):
    report, cache = run_with(spec, **options)
    assert report.verify() == report.bytes_held
    held = [cache.layers[layer_idx] for layer_idx in LAYERS]
    assert report.bytes_held == sum(layer.keys.nbytes + layer.values.nbytes for layer in held)


def test_verify_notices_a_cache_that_changed():
    report, cache = run_with("norm:keep_ratio=0.3")
    layer = cache.layers[3]
    layer.keys = torch.cat([layer.keys, layer.keys], dim=-2)
    with pytest.raises(ReceiptError, match=r"layer 3 has bytes_held \d+ now, but the receipt says \d+"):
        report.verify()


def test_verify_notices_memory_that_was_not_freed():
    report, cache = run_with("norm:keep_ratio=0.3")
    layer = cache.layers[5]
    layer.keys = torch.cat([layer.keys, layer.keys], dim=-2)[..., : layer.keys.shape[-2], :]
    with pytest.raises(ReceiptError, match="memory behind them is"):
        report.verify()


def test_verify_says_that_the_cache_is_gone():
    report, cache = run_with("norm")
    del cache
    gc.collect()
    with pytest.raises(ReceiptError, match="return_dict_in_generate"):
        report.verify()


def test_verify_needs_a_cache_that_belongs_to_the_report():
    with kvprune.compress(mllama(), "trim") as run:
        with pytest.raises(ReceiptError, match="nothing was compressed yet"):
            run.report.verify()
        generate(mllama(), mllama_inputs(BATCH), use_cache=False)
    with pytest.raises(ReceiptError, match="no cache belongs to this report"):
        run.report.verify()
    report, cache = run_with("norm")
    assert cache is not None
    with pytest.raises(ReceiptError, match="no cache belongs to this report"):
        copy.deepcopy(report).verify()


def test_the_peak_is_what_was_alive_at_once():
    """Two rows of 20 columns, 2 KV heads of width 8, float32: 5120 bytes of keys and values a layer."""
    full, _ = run_with("full", ["4ttt", "4tttt"])
    assert full.bytes_peak == full.bytes_held == 3 * 5120
    pruned, _ = run_with("norm:keep_ratio=0.25", ["4ttt", "4tttt"])
    assert pruned.bytes_held == 3 * 1280
    # Two layers are pruned already, the third is whole while its survivors are gathered.
    assert pruned.bytes_peak == 2 * 1280 + 5120 + 1280
    trimmed, _ = run_with("trim:keep_ratio=0.25", ["4ttt", "4tttt"])
    assert trimmed.bytes_peak == 5120 + 1280  # later layers receive survivors only
    beams, _ = run_with("full", ["4ttt", "4tttt"], num_beams=3)
    assert beams.bytes_full == 3 * beams.bytes_held == 3 * full.bytes_held
    assert beams.bytes_peak == 3 * 5120 + 3 * 5120  # the last layer is projected for each beam


def test_decisions_and_time_add_up_over_prefills():
    with kvprune.compress(mllama(), "norm") as run:
        for _ in range(3):
            generate(mllama(), mllama_inputs(BATCH), steps=2)
    report = run.report
    assert [layer.decisions for layer in report.layers] == [3, 3, 3]
    assert all(0 < layer.seconds < 10 for layer in report.layers)
    assert report.seconds > sum(layer.seconds for layer in report.layers)


@pytest.mark.parametrize(
    ("spec", "requested"),
    [
        ("full", {}),
        ("norm", {"keep_ratio": 0.5}),
        ("random:keep_tokens=3", {"keep_tokens": 3}),
        ("trim:k_ratio=0.1", {"k_ratio": 0.1}),
        ("trim:keep_ratio=0.25", {"keep_ratio": 0.25}),
    ],
)
def test_what_was_asked_stands_beside_what_was_kept(spec, requested):
    report, _ = run_with(spec)
    assert report.requested == requested
    assert json.loads(json.dumps(report.to_dict()))["requested"] == requested


def test_kept_of_stored_counts_padding_tiles_as_stored():
    report, _ = run_with("lossless", ["4ttt", "1ttt"])
    assert report.kept_fraction == 1
    assert report.kept_of_stored == (20 / 20 + 5 / 20) / 2


def test_warnings_say_what_a_user_should_know():
    assert run_with("norm")[0].warnings == ()
    assert "see no image" in run_with("norm", ["4ttt", "ttt"])[0].warnings[0]
    # Three images that decoding sees, but a budget of one token.
    assert "KV03" in run_with("norm:keep_tokens=1", ["111tt"])[0].warnings[0]


def test_reports_of_encoder_decoder_models_can_be_verified_too():
    inputs = {"input_ids": torch.arange(4, 22).reshape(2, 9)}
    with kvprune.compress(bart(), "trim") as run:
        cache = generate(bart(), inputs)[2]
    assert run.report.verify() == sum(
        layer.keys.nbytes + layer.values.nbytes for layer in cache.cross_attention_cache.layers
    )


@dataclass(frozen=True, kw_only=True)
class Broken(kvprune.ScoringPolicy):
    name = "broken"

    def score(self, view):
        raise ZeroDivisionError("no luck")


def test_an_error_of_the_policy_names_the_policy_and_the_layer():
    with (
        pytest.raises(
            PolicyFailedError, match="policy 'broken' raised ZeroDivisionError at layer 1: no luck"
        ),
        kvprune.compress(mllama(), Broken()),
    ):
        generate(mllama(), mllama_inputs(BATCH))
    assert generate(mllama(), mllama_inputs(BATCH)) is not None  # the model is as before
