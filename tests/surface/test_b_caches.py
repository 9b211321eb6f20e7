"""Kinds of caches, and what can be done with them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import OLD, SPECS, compressed, inputs_of, model_of
from generation import generate, tiny_bart, tiny_mllama
from surface_table import refused, works
from transformers import (
    CompileConfig,
    DynamicCache,
    EncoderDecoderCache,
    QuantizedCache,
    StaticCache,
    cache_utils,
)
from transformers.cache_utils import DynamicLayer

import kvprune
from kvprune.errors import UnsupportedCacheError
from kvprune.testing import masked_oracle, mllama_inputs

AREA = "Caches"
TEXT = ("input_ids", "attention_mask", "cross_attention_mask")


def text_config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


@works(AREA, "dynamic, made by the user", "the default cache, bit for bit", families=("Mllama", "BART"))
def test_own_cache(family):
    model, inputs = model_of(family), inputs_of(family)
    for spec in SPECS:
        expected = compressed(model, inputs, spec)[1]
        for config in ({}, {"config": text_config(model)}):
            cache = DynamicCache(**config)
            if family == "BART":
                cache = EncoderDecoderCache(cache, DynamicCache(**config))
            assert torch.equal(compressed(model, inputs, spec, past_key_values=cache)[1], expected)


@works(AREA, "static (cache_implementation='static')", "the dynamic cache under the same policy")
def test_static(family):
    model, inputs = model_of(family), inputs_of(family)
    for spec in SPECS:
        for beams in (1, 3):
            static = compressed(model, inputs, spec, num_beams=beams, cache_implementation="static")
            dynamic = compressed(model, inputs, spec, num_beams=beams)
            assert torch.equal(static[0], dynamic[0])
            assert (static[1] - dynamic[1]).abs().max() <= 1e-6
            assert static[2].report.bytes_held == dynamic[2].report.bytes_held


@works(
    AREA,
    "torch.compile of decoding (static cache, fullgraph; Mllama: transformers 5.23)",
    "decoding without it; one graph, no break, no recompilation in the second call",
    families=("Mllama", "BART"),
)
@pytest.mark.parametrize("spec", SPECS)
def test_compiled(family, spec):
    if OLD and family == "Mllama":
        pytest.skip("this release branches on the device in its cross-attention")
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    make = tiny_mllama if family == "Mllama" else tiny_bart
    model, inputs = make(1, dtype=torch.float64), inputs_of(family)
    expected = compressed(model, inputs, spec)[1]
    # Any backend shows what is traced; inductor would only take longer.
    how = CompileConfig(fullgraph=True, dynamic=False, backend="aot_eager", mode=None)
    how._compile_all_devices = True
    graphs = []
    with kvprune.compress(model, spec):
        for _ in range(2):
            logits = generate(model, inputs, cache_implementation="static", compile_config=how)[1]
            assert (logits - expected).abs().max() <= 1e-6
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 1]
    assert not counters["graph_break"]


@works(
    AREA,
    "quantized (text only; image tokens stay in the model's precision)",
    "the oracle with text quantized, float32 (stock transformers loses the image)",
    families=("Mllama",),
)
@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this release has no fp8 cache")
def test_quantized(family):
    model, inputs = model_of(family, torch.float32), inputs_of(family, dtype=torch.float32)
    fp8 = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    for spec in SPECS:
        sequences, logits, run = compressed(model, inputs, spec, **fp8)
        cache = QuantizedCache("fp8", text_config(model))
        for layer_idx in run.selections:
            cache.layers[layer_idx] = DynamicLayer()
        with masked_oracle(model, run.selections, run.prefill_selections):
            expected_sequences, expected, _ = generate(model, inputs, past_key_values=cache)
        assert torch.equal(sequences, expected_sequences)
        assert (logits - expected).abs().max() <= 1e-5
        assert "quantized cache" in run.report.warnings[0]
    stock = generate(model, inputs, **fp8)[1]
    assert (stock - compressed(model, inputs, "full", **fp8)[1]).abs().max() > 1


@refused(AREA, "quantized", "by transformers itself", families=("BART", "Whisper"))
def test_quantized_encoder_decoder(family):
    with pytest.raises(ValueError, match="quantized cache"):
        compressed(model_of(family), inputs_of(family), "trim", cache_implementation="quantized")


@refused(AREA, "offloaded", "decoding would read image keys too early; use the default or a static cache")
def test_offloaded(family):
    model, inputs = model_of(family), inputs_of(family)
    cache = DynamicCache(config=text_config(model))
    cache.offloading = True  # its own constructor wants a GPU
    if family != "Mllama":
        inputs["decoder_input_ids"] = torch.tensor([[2]] * 3)
        cache = EncoderDecoderCache(DynamicCache(config=text_config(model)), cache)
    with pytest.raises(UnsupportedCacheError, match="offloads its layers"), kvprune.compress(model, "trim"):
        model(**inputs, past_key_values=cache, use_cache=True)


@works(
    AREA,
    "filled before the compression began (dynamic)",
    "stock; there is nothing left to decide",
    ("Mllama",),
)
def test_filled_before(family):
    model, inputs = model_of(family), inputs_of(family)
    step = {"input_ids": torch.full((3, 1), 9), "attention_mask": torch.ones(3, 8, dtype=torch.long)}
    seen = inputs["cross_attention_mask"]
    step["cross_attention_mask"] = torch.cat([seen, seen[:, -1:]], dim=1)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        expected = model(**step, past_key_values=copy.deepcopy(cache)).logits
        with kvprune.compress(model, "trim"):
            assert torch.equal(model(**step, past_key_values=cache).logits, expected)


@refused(AREA, "filled before the compression began (static)", "start with an empty cache", ("Mllama",))
def test_static_filled_before(family):
    model, filled = model_of(family), inputs_of(family, "one")
    cache = StaticCache(config=text_config(model), max_cache_len=120)
    for layer_idx in (1, 3, 5):  # as generate does: cross-attention layers are as wide as one image
        cache.layers[layer_idx].max_cache_len = 20
    with torch.no_grad():
        model(**filled, past_key_values=cache, use_cache=True)
        with (
            pytest.raises(UnsupportedCacheError, match="filled before the compression began"),
            kvprune.compress(model, "trim"),
        ):
            model(**filled, past_key_values=cache, use_cache=True)


@works(AREA, "prefix reuse: deep copies of one prefilled cache", "the oracle, for each copy", ("Mllama",))
def test_prefix_reuse(family):
    model, inputs = model_of(family), mllama_inputs(["tt4tttt"], dtype=torch.float64)
    prefix = {name: value[:, :4] if name in TEXT else value for name, value in inputs.items()}
    rest = {name: inputs[name] for name in TEXT}
    for spec in SPECS:
        with kvprune.compress(model, spec) as run, torch.no_grad():
            cache = model(**prefix, use_cache=True).past_key_values
            found = [generate(model, rest, past_key_values=copy.deepcopy(cache))[1] for _ in range(2)]
        with masked_oracle(model, run.selections, run.prefill_selections), torch.no_grad():
            cache = model(**prefix, use_cache=True).past_key_values
            expected = generate(model, rest, past_key_values=cache)[1]
        assert all((logits - expected).abs().max() <= 1e-6 for logits in found)


@works(AREA, "several turns with one cache, text only in later ones", "the oracle", families=("Mllama",))
def test_turns(family):
    model, inputs = model_of(family), mllama_inputs(["tt4ttttttt"], dtype=torch.float64)
    for spec in SPECS:
        run, logits = None, []
        for _ in range(2):
            context = (
                kvprune.compress(model, spec)
                if run is None
                else masked_oracle(model, run.selections, run.prefill_selections)
            )
            with context as entered:
                first = {name: value[:, :5] if name in TEXT else value for name, value in inputs.items()}
                _, one, cache = generate(model, first, steps=2)
                turn = {name: inputs[name] for name in TEXT}
                logits.append(torch.cat([one, generate(model, turn, past_key_values=cache)[1]]))
            run = run or entered
        assert (logits[0] - logits[1]).abs().max() <= 1e-6


@works(AREA, "several turns, a new image in a later one", "the oracle, turn by turn", families=("Mllama",))
def test_new_image(family):
    model, whole = model_of(family), mllama_inputs(["tt4tttt1tt"], dtype=torch.float64)
    images = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    first = {name: value[:, :1] if name in images else value[:, :6] for name, value in whole.items()}
    first["cross_attention_mask"] = first["cross_attention_mask"][:, :, :1]
    second = {name: value[:, 1:] if name in images else value for name, value in whole.items()}
    for spec in SPECS:
        turns = []
        with kvprune.compress(model, spec) as run, torch.no_grad():
            cache = model(**first, use_cache=True).past_key_values
            turns.append((run.selections, run.prefill_selections))
            logits = generate(model, second, past_key_values=cache)[1]
            turns.append((run.selections, run.prefill_selections))
        with masked_oracle(model, *turns[0]), torch.no_grad():
            cache = model(**first, use_cache=True).past_key_values
        with masked_oracle(model, *turns[1]):
            expected = generate(model, second, past_key_values=cache)[1]
        assert (logits - expected).abs().max() <= 1e-6
