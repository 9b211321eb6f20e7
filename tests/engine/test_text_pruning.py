"""Generation with a pruned text cache, situation by situation, against the untouched, masked model."""

from __future__ import annotations

import functools

import pytest
import torch
from generation import LAYOUTS, TOLERANCE, bart, generate, mllama
from pruned_text import SomeText, turns
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import kvprune
from kvprune.cache.text_layer import TextKVLayer
from kvprune.errors import (
    PolicyFailedError,
    ReceiptError,
    SelectionError,
    UnsupportedCacheError,
    UnsupportedModelError,
)
from kvprune.testing import masked_oracle, mllama_inputs, tiny_mllama


def apart(model, inputs, policy, steps=6, **options):
    """Largest difference to the oracle; tokens are the same."""
    with kvprune.compress(model, policy) as run:
        sequences, logits, cache = generate(model, inputs, steps, **options)
    with masked_oracle(model, run.selections, run.prefill_selections, text_selections=run.text_selections):
        expected_sequences, expected, _ = generate(model, inputs, steps, **options)
    assert not logits.isnan().any()
    assert torch.equal(sequences, expected_sequences)
    return float((logits - expected).abs().max()), run, cache


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layouts", LAYOUTS, ids="+".join)
@pytest.mark.parametrize("by_head", [True, False])
def test_greedy_equals_the_oracle(layouts, by_head, attention):
    model = mllama(torch.float32, attention)
    difference, run, _ = apart(model, mllama_inputs(layouts), SomeText(by_head=by_head, cross=by_head))
    assert difference <= TOLERANCE[torch.float32]
    assert sorted(run.text_selections) == [0, 2, 4, 6]


def test_in_float64_only_rounding_is_left():
    model = mllama(torch.float64)
    difference, _, _ = apart(model, mllama_inputs(("tt4ttt",), dtype=torch.float64), SomeText(), steps=10)
    assert difference <= TOLERANCE[torch.float64]


def test_dropping_text_matters():
    """What the oracle masks changes the logits: a test that could not fail would be no test."""
    model, inputs = mllama(torch.float64), mllama_inputs(("tt4ttttt",), dtype=torch.float64)
    _, expected, _ = generate(model, inputs)
    with kvprune.compress(model, SomeText(cross=False)):
        _, logits, _ = generate(model, inputs)
    assert (logits - expected)[0].abs().max() <= 1e-6  # prefill is untouched
    assert (logits - expected)[1].abs().max() > 1e-2


def test_keeping_all_text_is_bit_identical():
    model, inputs = mllama(), mllama_inputs(("4ttt",))
    _, expected, _ = generate(model, inputs)
    with kvprune.compress(model, SomeText(text_keep=1.0, cross=False)):
        _, logits, _ = generate(model, inputs)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_equal_the_oracle(options):
    inputs = mllama_inputs(("tt4ttt", "t1tt", "tt2tttt"))
    assert apart(mllama(), inputs, SomeText(), **options)[0] <= TOLERANCE[torch.float32]


def test_draft_tokens_are_taken_back():
    model, inputs = mllama(), mllama_inputs(("tt4ttttttt",))
    policy = SomeText(text_keep=0.6)
    with kvprune.compress(model, policy):
        expected, _, _ = generate(model, inputs, 12)
    with kvprune.compress(model, policy):
        got, _, cache = generate(model, inputs, 12, prompt_lookup_num_tokens=3)
    assert torch.equal(got, expected)
    assert isinstance(cache.layers[0], TextKVLayer)


def test_a_sample_alone_keeps_what_it_keeps_in_a_batch():
    model, layouts = mllama(), ("tt4ttt", "t1tt", "tt2tttt")
    with kvprune.compress(model, SomeText()) as together, torch.no_grad():
        model(**mllama_inputs(layouts))
    longest = max(map(len, layouts))
    alone = mllama_inputs(layouts)
    for sample, layout in enumerate(layouts):
        first = longest - len(layout)
        one = {name: tensor[sample : sample + 1] for name, tensor in alone.items()}
        for name in ("input_ids", "attention_mask", "cross_attention_mask"):
            one[name] = one[name][:, first:]
        with kvprune.compress(model, SomeText()) as run, torch.no_grad():
            model(**one)
        for layer_idx, selection in run.text_selections.items():
            kept = together.text_selections[layer_idx].to_mask()[sample, :, first:]
            assert torch.equal(selection.to_mask()[0], kept)


def test_a_second_turn_of_text_equals_the_oracle():
    model = mllama()
    first, second = turns(mllama_inputs(("tt4tttttt", "1tttttttt")), 5, 1)
    with kvprune.compress(model, SomeText()) as run, torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
        _, logits, _ = generate(model, second, past_key_values=cache)
    oracle = masked_oracle(model, run.selections, run.prefill_selections, text_selections=run.text_selections)
    with oracle, torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
        _, expected, _ = generate(model, second, past_key_values=cache)
    assert (logits - expected).abs().max() <= TOLERANCE[torch.float32]


def test_a_second_turn_with_an_image_prunes_text_again():
    model = mllama()
    first, second = turns(mllama_inputs(("tt4tt1tt", "t1tt2ttt")), 5, 1)
    with kvprune.compress(model, SomeText(cross=False)) as run, torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
        one = run.selections, run.prefill_selections
        text = run.text_selections
        _, logits, _ = generate(model, second, past_key_values=cache)
    with masked_oracle(model, *one, text_selections=text), torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
    oracle = masked_oracle(
        model,
        run.selections,
        run.prefill_selections,
        text_selections=run.text_selections,
        prefill_text_selections=text,
    )
    with oracle:
        _, expected, _ = generate(model, second, past_key_values=cache)
    assert (logits - expected).abs().max() <= TOLERANCE[torch.float32]
    assert run.report.prefills == 2
    assert all(selection.columns == 8 for selection in run.text_selections.values())
    for layer_idx, selection in run.text_selections.items():  # what went in the first turn is gone
        now, before = selection.to_mask()[..., :5], text[layer_idx].to_mask()
        assert not (now & ~before).any()


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ("uneven heads", SelectionError, "KV06: .* different numbers of entries in different heads"),
        ("uneven layers", SelectionError, "KV06: .* an earlier layer keeps"),
        ("padding", SelectionError, "KV04: .* keeps padding"),
        ("last", SelectionError, "KV03: .* drops the last row's own entry"),
        ("shape", SelectionError, "KV01: .* out of 6 entries, expected .* out of 7"),
        ("bits", SelectionError, "KV01: .* has bits, but text entries cannot be quantized"),
        ("type", SelectionError, "returned Tensor, expected a Selection or None"),
        ("raises", PolicyFailedError, "ZeroDivisionError at the self-attention of layer 0: no"),
    ],
)
def test_wrong_selections_are_refused(wrong, error, message):
    model, inputs = mllama(), mllama_inputs(("tt4ttt", "tt2tttt"))
    policy = SomeText(wrong=wrong)
    with pytest.raises(error, match=message), kvprune.compress(model, policy), torch.no_grad():
        model(**inputs)


def test_what_cannot_be_pruned_is_refused_by_name():
    inputs = mllama_inputs(("tt4ttt",))
    with (
        pytest.raises(UnsupportedCacheError, match=r"in a StaticLayer at layer 0, from which no token"),
        kvprune.compress(mllama(), SomeText()),
    ):
        generate(mllama(), inputs, cache_implementation="static")
    with pytest.raises(UnsupportedModelError, match="'some-text' needs 'text_cache', which the BART"):
        kvprune.compress(bart(), SomeText())
    first = tiny_mllama(1, cross_layers=(0, 2))
    with (
        pytest.raises(UnsupportedModelError, match="first layer of this decoder is a cross-attention layer"),
        kvprune.compress(first, SomeText()),
        torch.no_grad(),
    ):
        first(**inputs)


def test_a_cache_with_pruned_text_is_refused_outside():
    model, inputs = mllama(), mllama_inputs(("tt4ttt",))
    with kvprune.compress(model, SomeText(cross=False)), torch.no_grad():
        cache = model(**inputs).past_key_values
    mask = torch.cat([inputs["cross_attention_mask"], inputs["cross_attention_mask"][:, -1:]], dim=1)
    call = functools.partial(
        model, input_ids=torch.tensor([[9]]), cross_attention_mask=mask, past_key_values=cache
    )
    with pytest.raises(UnsupportedCacheError, match="the model runs without kvprune"), torch.no_grad():
        call()
    with kvprune.compress(model, "full"), torch.no_grad():
        with pytest.raises(UnsupportedCacheError, match=r"\[1, 7\] here, got \[1, 3\]"):
            call(attention_mask=torch.ones(1, 3, dtype=torch.long))
        call()


def test_receipts_count_text_apart():
    model, inputs = mllama(), mllama_inputs(("tt4ttt", "t1tt"))
    with kvprune.compress(model, SomeText()) as run:
        _, _, cache = generate(model, inputs, 3)
        report = run.report
        assert report.verify() == report.bytes_held
    layers = [cache.layers[i] for i in (0, 2, 4, 6)]
    assert [receipt.layer_idx for receipt in report.text_layers] == [0, 2, 4, 6]
    assert {(receipt.tokens, receipt.width) for receipt in report.text_layers} == {(6, 3)}
    added = layers[0].held - 3  # tokens that were decoded
    assert report.text_bytes_held == sum(layer.bytes_held * 3 // (3 + added) for layer in layers)
    assert report.text_bytes_full == report.text_bytes_held * 2
    assert report.text_kept_fraction == pytest.approx(0.5)
    assert report.bytes_held == sum(cache.layers[i].bytes_held for i in (1, 3, 5))
    assert report.to_dict()["text_layers"][0]["width"] == 3
    assert "in 4 layers; kept 50.0% of text entries" in str(report)
    layers[0].valid = layers[0].slots = None
    layers[0].keys = layers[0].keys[:, :, :2]
    with pytest.raises(ReceiptError, match="layer 0 holds 2 text entries"):
        report.verify()


def test_without_a_text_policy_nothing_is_there():
    model, inputs = mllama(), mllama_inputs(("tt4ttt",))
    with kvprune.compress(model, "norm") as run:
        _, _, cache = generate(model, inputs, 3)
    assert run.text_selections == {}
    assert type(cache.layers[0]) is DynamicLayer
    assert run.report.to_dict()["text_bytes_held"] is None
    assert "text cache" not in str(run.report)


def test_without_a_cache_text_is_not_asked_about():
    model, inputs = mllama(), mllama_inputs(("tt4ttt",))
    with kvprune.compress(model, SomeText(cross=False, wrong="raises")) as run, torch.no_grad():
        model(**inputs, use_cache=False)
    assert run.text_selections == {}
    assert any("no cache" in warning for warning in run.report.warnings)


def test_an_empty_cache_that_is_handed_in_is_used():
    model, inputs = mllama(), mllama_inputs(("tt4ttt",))
    cache = DynamicCache(config=model.config.text_config)
    with kvprune.compress(model, SomeText()), torch.no_grad():
        model(**inputs, past_key_values=cache)
    assert (cache.layers[0].seen, cache.layers[0].held) == (6, 3)
