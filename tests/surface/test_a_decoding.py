"""Ways of decoding."""

from __future__ import annotations

import pytest
import torch
from families import OLD, SPECS, compressed, inputs_of, model_of
from generation import difference_to_oracle, generate, tiny_bart, tiny_mllama, tiny_whisper
from surface_table import refused, works

import kvprune
from kvprune.errors import UnsupportedCacheError, UnsupportedModelError
from kvprune.testing import masked_oracle

AREA = "Decoding"
TINY = {"Mllama": tiny_mllama, "BART": tiny_bart, "Whisper": tiny_whisper}


@works(AREA, "greedy", "the oracle")
def test_greedy(family):
    for spec in SPECS:
        assert difference_to_oracle(model_of(family), inputs_of(family), spec) <= 1e-6


@works(AREA, "sampling", "the oracle, from the same random state")
def test_sampling(family):
    for spec in SPECS:
        assert difference_to_oracle(model_of(family), inputs_of(family), spec, do_sample=True) <= 1e-6


@works(
    AREA,
    "several return sequences",
    "the oracle; the image is held once for all of a sample (not in Whisper, which encodes it for each)",
)
def test_return_sequences(family):
    model, inputs = model_of(family), inputs_of(family)
    for spec in SPECS:
        several = {"do_sample": True, "num_return_sequences": 3}
        assert difference_to_oracle(model, inputs, spec, **several) <= 1e-6
        run, one = compressed(model, inputs, spec, **several)[2], compressed(model, inputs, spec)[2]
        rows = 3 if family == "Whisper" else 1  # Whisper encodes the audio for each of them
        assert run.report.bytes_held == rows * one.report.bytes_held


@works(AREA, "beam search", "the oracle; 4 beams hold the bytes of 1, reordering copies no image")
def test_beams(family):
    model = model_of(family)
    for batch in ("one", "ragged"):
        for spec in SPECS:
            assert difference_to_oracle(model, inputs_of(family, batch), spec, num_beams=4) <= 1e-6
            held = compressed(model, inputs_of(family, batch), spec, num_beams=4)[2].report
            one = compressed(model, inputs_of(family, batch), spec)[2].report
            assert held.bytes_held == one.bytes_held
            assert held.bytes_full == 4 * one.bytes_full


@works(AREA, "beam sampling", "the oracle, from the same random state")
def test_beam_sampling(family):
    for spec in SPECS:
        assert (
            difference_to_oracle(model_of(family), inputs_of(family), spec, num_beams=3, do_sample=True)
            <= 1e-6
        )


@works(AREA, "prompt lookup", "greedy under the same policy (stock Mllama crashes)")
def test_prompt_lookup(family):
    model, inputs = model_of(family), inputs_of(family, "one")
    for spec in SPECS:
        expected, _, greedy = compressed(model, inputs, spec, steps=12)
        found, _, run = compressed(model, inputs, spec, steps=12, prompt_lookup_num_tokens=3)
        assert torch.equal(found, expected)
        assert run.selections == greedy.selections  # no draft enters the prefill


@works(
    AREA,
    "assisted by a second model",
    "greedy; no draft enters the prefill. Compress an Mllama assistant, too",
)
def test_assisted(family):
    if OLD and family == "Mllama":
        pytest.skip("an Mllama assistant crashes in this release")
    model, inputs = model_of(family), inputs_of(family, "one")
    assistant = TINY[family](3, dtype=torch.float64)
    for spec in SPECS:
        expected, _, greedy = compressed(model, inputs, spec, steps=12)
        with kvprune.compress(assistant, "trim"):
            found, _, run = compressed(model, inputs, spec, steps=12, assistant_model=assistant)
        assert torch.equal(found, expected)
        assert run.selections == greedy.selections


@works(
    AREA,
    "use_cache=False, policies that decide onward",
    "the oracle in each forward call, which decides anew",
)
def test_no_cache(family):
    model, inputs = model_of(family), inputs_of(family)
    if family != "Mllama":
        inputs["decoder_input_ids"] = torch.tensor([[2, 5, 6]] * 3)
    for spec in ("full", "lossless", "trim:keep_ratio=0.3", "norm:keep_ratio=0.3,reach=onward"):
        with torch.no_grad(), kvprune.compress(model, spec) as run:
            logits = model(**inputs, use_cache=False).logits
        with torch.no_grad(), masked_oracle(model, run.selections, run.prefill_selections):
            expected = model(**inputs, use_cache=False).logits
        assert (logits - expected).abs().max() <= 1e-6
        assert run.report.bytes_held == run.report.bytes_full == 0
        assert "no cache" in run.report.warnings[0]
    if family == "Mllama":  # and inside generate, where each step is such a call
        run = compressed(model, inputs, "trim", use_cache=False)[2]
        assert run.report.prefills == 6


@refused(
    AREA, "use_cache=False, policies that prune after attention", "nothing would be pruned; decide onward"
)
def test_no_cache_after_attention(family):
    model, inputs = model_of(family), inputs_of(family)
    with pytest.raises(UnsupportedCacheError, match="nothing would be pruned"):
        compressed(model, inputs, "norm:keep_ratio=0.3", use_cache=False)


@refused(
    AREA,
    "prefill in chunks (prefill_chunk_size)",
    "a policy would see the first chunk only (with images, by transformers itself)",
)
@pytest.mark.skipif(OLD, reason="this release ignores the option")
def test_chunked_prefill(family):
    inputs = inputs_of(family)
    if family != "Mllama":
        inputs["decoder_input_ids"] = torch.tensor([[2, 5, 6, 7]] * 3)
    with pytest.raises((ValueError, UnsupportedModelError), match="chunk"):
        compressed(model_of(family), inputs, "trim", prefill_chunk_size=2)


@works(
    AREA, "re-reading (reread=True): greedy, beams, sampling", "the oracle that reads the last token again"
)
def test_rereading(family):
    model, inputs = model_of(family), inputs_of(family)
    for spec in SPECS:
        for options in ({}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
            torch.manual_seed(0)
            with kvprune.compress(model, spec, reread=True) as run:
                sequences, logits, _ = generate(model, inputs, **options)
            torch.manual_seed(0)
            with masked_oracle(model, run.selections, run.prefill_selections, reread=True):
                expected = generate(model, inputs, **options)
            assert torch.equal(sequences, expected[0])
            assert (logits - expected[1]).abs().max() <= 1e-6
            assert run.report.rereads == 1


@refused(
    AREA, "re-reading without a cache, or from one that cannot be cut", "use_cache=True, the default cache"
)
def test_rereading_needs_a_cache(family):
    model, inputs = model_of(family), inputs_of(family)
    for options, says in (
        ({"use_cache": False}, "use_cache=True"),
        ({"cache_implementation": "static"}, "Static"),
    ):
        if OLD and family == "Mllama" and "cache_implementation" in options:
            continue  # this release has no static cache for it
        with (
            pytest.raises(UnsupportedCacheError, match=says),
            kvprune.compress(model, "trim", reread=True),
        ):
            generate(model, inputs, **options)


@refused(AREA, "re-reading a prompt that ends with padding", "pad on the left")
def test_rereading_after_padding(family):
    model, inputs = model_of(family), inputs_of(family)
    name = "attention_mask"
    if family != "Mllama":
        name = "decoder_attention_mask"
        inputs["decoder_input_ids"] = torch.tensor([[2, 5, 6]] * 3)
    mask = torch.ones_like(inputs["input_ids" if family == "Mllama" else "decoder_input_ids"])
    mask[1, -1] = 0
    with (
        pytest.raises(UnsupportedCacheError, match="pad on the left"),
        kvprune.compress(model, "trim", reread=True),
        torch.no_grad(),
    ):
        model(**{**inputs, name: mask})
