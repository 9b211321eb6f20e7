"""Generation with a compressed BART and Whisper against the untouched models."""

from __future__ import annotations

import pytest
import torch
from generation import POLICIES, TOLERANCE, bart, difference_to_oracle, generate, whisper
from transformers import DynamicCache, EncoderDecoderCache

import kvprune
from kvprune.adapters.families.texts import BartAdapter
from kvprune.errors import UnsupportedCacheError


def text(padded: bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 60, (3, 20), generator=torch.Generator().manual_seed(0))
    if not padded:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    mask[2, 5:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def audio(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(2, 8, 100, generator=torch.Generator().manual_seed(0)).to(dtype)}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("spec", POLICIES)
def test_bart_equals_the_oracle(spec, padded, attention, beams):
    model = bart(torch.float32, attention)
    assert difference_to_oracle(model, text(padded), spec, num_beams=beams) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("spec", POLICIES)
def test_whisper_equals_the_oracle(spec, attention, beams):
    model = whisper(torch.float32, attention)
    assert difference_to_oracle(model, audio(), spec, num_beams=beams) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("make", [bart, whisper])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_full_is_bit_identical(make, attention, beams):
    model = make(torch.float32, attention)
    inputs = text(padded=True) if make is bart else audio()
    sequences, logits, _ = generate(model, inputs, num_beams=beams)
    with kvprune.compress(model, "full"):
        got_sequences, got, _ = generate(model, inputs, num_beams=beams)
    assert torch.equal(sequences, got_sequences)
    assert torch.equal(logits, got)


def test_lossless_drops_the_encoders_padding_and_nothing_else():
    model = bart(torch.float64)
    inputs = {name: tensor[1:] for name, tensor in text(padded=True).items()}  # 12 and 5 of 20 columns
    _, expected, _ = generate(model, inputs)
    with kvprune.compress(model, "lossless") as run:
        _, logits, cache = generate(model, inputs)
    assert (logits - expected).abs().max() <= 1e-6
    layer = cache.cross_attention_cache.layers[0]
    assert layer.keys.shape[-2] == 12
    assert run.report.kept_fraction == 1.0
    assert run.report.bytes_full == run.report.bytes_held * 20 // 12


@pytest.mark.parametrize("make", [bart, whisper])
def test_bytes_held_are_those_of_the_tensors(make):
    model = make()
    inputs = text(padded=True) if make is bart else audio()
    with kvprune.compress(model, "trim:k_ratio=0.1") as run:
        _, _, cache = generate(model, inputs)
    layers = cache.cross_attention_cache.layers
    assert run.report.bytes_held == sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert run.report.bytes_held == sum(
        layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes() for layer in layers
    )
    assert run.report.bytes_held < run.report.bytes_full


def test_later_layers_project_only_survivors(monkeypatch):
    model = bart()
    widths = []
    for layer in model.get_decoder().layers:
        handle = layer.encoder_attn.k_proj.register_forward_hook(
            lambda module, args, output: widths.append(output.shape[1])
        )
        monkeypatch.setattr(layer, "_test_handle", handle, raising=False)
    try:
        with kvprune.compress(model, "trim:keep_ratio=0.25"):
            generate(model, text(padded=False), steps=3)
    finally:
        for layer in model.get_decoder().layers:
            layer._test_handle.remove()
    assert widths == [20, 5, 5]


def test_random_is_the_same_for_all_beams_of_a_sample():
    model = whisper()
    with kvprune.compress(model, "random:keep_ratio=0.3") as run:
        generate(model, audio(), num_beams=3)
    indices = run.selections[0].indices
    assert torch.equal(indices[0], indices[1])
    assert torch.equal(indices[3], indices[5])
    assert not torch.equal(indices[0], indices[3])


def test_other_caches_are_refused_by_name():
    model, inputs = bart(), text(padded=False)
    offloading = EncoderDecoderCache(
        DynamicCache(config=model.config), DynamicCache(config=model.config, offloading=True)
    )
    with pytest.raises(UnsupportedCacheError, match="offloads"), kvprune.compress(model, "lossless"):
        model(**inputs, decoder_input_ids=torch.tensor([[2]] * 3), past_key_values=offloading)
    with pytest.raises(UnsupportedCacheError, match="use_cache=True"), kvprune.compress(model, "norm"):
        model(**inputs, decoder_input_ids=torch.tensor([[2]] * 3), use_cache=False)


def test_a_family_is_a_declaration():
    """A third party's BART-like model needs names only."""

    class OtherAdapter(BartAdapter):
        family = "other"
        model_classes = ("OtherForConditionalGeneration",)

    class OtherForConditionalGeneration(type(bart())):
        pass

    assert OtherAdapter.matches(OtherForConditionalGeneration(bart().config))
    assert not OtherAdapter.matches(whisper())
    assert all(probe.ok for probe in OtherAdapter.probe())
