"""Inputs that do not fit equal the oracle, or are refused before anything is computed wrongly."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.modeling_outputs import BaseModelOutput

import kvprune
from kvprune.adapters.tiny.families import TINY_FAMILIES
from kvprune.errors import (
    CompressionStateError,
    NestedCompressionError,
    UnsupportedCacheError,
    UnsupportedModelError,
)
from kvprune.testing import masked_oracle, tiny_bart

BART, T5, M2M100 = (f"{name}ForConditionalGeneration" for name in ("Bart", "T5", "M2M100"))
WHISPER, VISION = "WhisperForConditionalGeneration", "VisionEncoderDecoderModel"
TEXTS = (BART, T5, M2M100)
ALL = (*TEXTS, WHISPER, VISION)
SPECS = ("full", "norm:keep_ratio=0.5", "trim:keep_ratio=0.5")


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: TINY_FAMILIES[name].model(name, attn_implementation="eager") for name in ALL}


def encoded(name: str, model: Any) -> Tensor:
    """Return encoder states ``[2, S, C]``."""
    with torch.no_grad():
        return model.get_encoder()(**TINY_FAMILIES[name].batch(torch.float32, False))[0]


def read(model: Any, states: Any, **options: Any) -> Tensor:
    """Return the logits of a prompt of four tokens and of one token after it."""
    tokens = torch.randint(4, 60, (2, 5), generator=torch.Generator().manual_seed(0))
    masked = {name: value for name, value in options.items() if name == "attention_mask"}
    with torch.no_grad():
        first = model(encoder_outputs=states, decoder_input_ids=tokens[:, :4], use_cache=True, **options)
        cache = first.past_key_values
        then = model(
            encoder_outputs=states,
            decoder_input_ids=tokens[:, 4:],
            use_cache=True,
            past_key_values=cache,
            **masked,
        )
    return torch.cat([first.logits, then.logits], dim=1)


def require_oracle(model: Any, states: Any, **options: Any) -> None:
    """Raise unless the model is stock's under `full`, and the oracle's under policies that prune."""
    stock = read(model, states, **options)
    for spec in SPECS:
        with kvprune.compress(model, spec) as run:
            logits = read(model, states, **options)
        with masked_oracle(model, run.selections, run.prefill_selections):
            wanted = read(model, states, **options)
        assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max(), spec
        if spec == "full":
            assert torch.equal(logits, stock)
        else:
            assert run.report.kept_fraction < 0.7


def require_refused(model: Any, states: Any, error: type[Exception], match: str, **options: Any) -> None:
    """Raise unless every policy refuses, and the model answers as before afterwards."""
    for spec in SPECS:
        with kvprune.compress(model, spec) as run, pytest.raises(error, match=match):
            read(model, states, **options)
        assert run.report.prefills == 0, spec


# Encoder outputs that are passed by hand.


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", [lambda states: (states,), lambda s: BaseModelOutput(last_hidden_state=s)])
def test_encoder_outputs_of_any_kind_equal_the_oracle(models: Any, name: str, kind: Any) -> None:
    require_oracle(models[name], kind(encoded(name, models[name])))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("batch", [1, 3])
def test_encoder_outputs_of_another_batch_are_refused(models: Any, name: str, batch: int) -> None:
    states = encoded(name, models[name]).repeat(2, 1, 1)[:batch]
    told = f"must have the same batch, got 2 texts and encoder states of {batch}"
    require_refused(models[name], BaseModelOutput(last_hidden_state=states), UnsupportedCacheError, told)


@pytest.mark.parametrize("name", ALL)
def test_encoder_outputs_without_columns_are_refused(models: Any, name: str) -> None:
    states = BaseModelOutput(last_hidden_state=encoded(name, models[name])[:, :0])
    require_refused(
        models[name], states, UnsupportedCacheError, r"encoder states \[2, 0, 32\] have no columns"
    )


def test_a_tensor_in_place_of_encoder_outputs_is_refused(models: Any) -> None:
    for name in (*TEXTS, WHISPER):  # they take the first sample for all states
        states = encoded(name, models[name])
        require_refused(
            models[name], states, UnsupportedCacheError, rf"tensor \[B, S, C\], got \[{states.shape[1]}, 32\]"
        )


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("width", [10, 14])
def test_encoder_outputs_of_another_length_than_the_mask_are_refused(
    models: Any, name: str, width: int
) -> None:
    states = BaseModelOutput(last_hidden_state=encoded(name, models[name]))
    told = rf"must be \[B, S\] = \[2, 12\], got \[2, {width}\]"
    mask = torch.ones(2, width, dtype=torch.long)
    require_refused(models[name], states, UnsupportedCacheError, told, attention_mask=mask)


def test_states_without_text_are_refused(models: Any) -> None:
    decoder, states = models[BART].get_decoder(), encoded(BART, models[BART])
    with (
        kvprune.compress(models[BART], "norm"),
        pytest.raises(UnsupportedCacheError, match="neither input_ids nor inputs_embeds"),
    ):
        decoder(encoder_hidden_states=states)


# Masks of the encoder.

PADDED = torch.tensor([[1] * 12, [1] * 8 + [0] * 4])
ADDITIVE = torch.zeros(2, 12).masked_fill(PADDED == 0, float("-inf"))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("mask", [PADDED, PADDED.bool(), PADDED.float(), PADDED.to(torch.uint8), None])
def test_masks_of_zeros_and_ones_equal_the_oracle(models: Any, name: str, mask: Tensor | None) -> None:
    states = BaseModelOutput(last_hidden_state=encoded(name, models[name]))
    require_oracle(models[name], states, **({} if mask is None else {"attention_mask": mask}))


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize(
    ("mask", "told"),
    [
        (ADDITIVE, r"mask \[B, N\] of the encoder must be 1 .* 0 at padding, got -inf; .* reversed"),
        (ADDITIVE.clamp(min=torch.finfo(torch.float32).min), r"got -3\.4e\+38; "),
        (PADDED * 0.5, r"got 0\.5; transformers would take every number but 0 for 1"),
        (PADDED.bool()[:, None, None], r"must be \[B, S\] = \[2, 12\], got \[2, 1, 1, 12\]"),
        (
            ADDITIVE[:, None, None],
            r"must be \[B, S\] = \[2, 12\], got \[2, 1, 1, 12\]; it says of each column",
        ),
        (PADDED[:, None], r"got \[2, 1, 12\]"),
        (PADDED[:1], r"got \[1, 12\]"),
    ],
)
def test_other_masks_are_refused(models: Any, name: str, mask: Tensor, told: str) -> None:
    states = BaseModelOutput(last_hidden_state=encoded(name, models[name]))
    require_refused(models[name], states, UnsupportedCacheError, told, attention_mask=mask)


def test_an_additive_mask_of_the_text_is_refused(models: Any) -> None:
    states = BaseModelOutput(last_hidden_state=encoded(BART, models[BART]))
    mask = torch.zeros(2, 4)
    mask[1, :2] = float("-inf")
    told = r"mask \[B, N\] of the decoder must be 1 .* got -inf"
    require_refused(models[BART], states, UnsupportedCacheError, told, decoder_attention_mask=mask)


def test_a_list_in_place_of_a_mask_is_refused(models: Any) -> None:
    states = BaseModelOutput(last_hidden_state=encoded(BART, models[BART]))
    for whose, options in (
        ("encoder", {"attention_mask": [[1] * 12] * 2}),
        ("decoder", {"decoder_attention_mask": [[1] * 4] * 2}),
    ):
        told = rf"mask of the {whose} must be a tensor \[B, N\], got a list"
        require_refused(models[BART], states, UnsupportedCacheError, told, **options)


@pytest.mark.parametrize("name", ["T5GemmaForConditionalGeneration", WHISPER, BART])
def test_padding_of_the_text_counts_with_a_static_cache_as_with_any(name: str) -> None:
    """`generate` makes 4-D masks for a static cache, or one for each kind of layer; padding must not vote."""
    tiny = TINY_FAMILIES[name]
    model = tiny.model(name, attn_implementation="eager")
    tokens = torch.randint(4, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    prompt = {"decoder_input_ids": tokens, "decoder_attention_mask": mask, "max_new_tokens": 2}
    inputs = {**tiny.batch(torch.float32, True), **prompt, "do_sample": False}
    found = []
    for cache in ({}, {"cache_implementation": "static"}):
        for spec in ("full", "trim:keep_ratio=0.25"):
            with kvprune.compress(model, spec) as run:
                model.generate(**inputs, **cache)
        found.append([selection.indices for selection in run.selections.values()])
    assert all(torch.equal(dynamic, static) for dynamic, static in zip(*found, strict=True))


# Caches.


@pytest.mark.parametrize("name", ALL)
def test_what_is_no_cache_is_refused(models: Any, name: str) -> None:
    states = encoded(name, models[name])
    told = r"must be an EncoderDecoderCache of transformers, got \(\(tensor"
    cache = ((states, states),) * 2
    require_refused(models[name], (states,), UnsupportedCacheError, told, past_key_values=cache)


@pytest.mark.parametrize("name", [BART, T5, M2M100, VISION])
def test_a_cache_for_text_alone_is_refused(models: Any, name: str) -> None:
    states, config = encoded(name, models[name]), models[name].get_decoder().config
    for cache in (DynamicCache(), StaticCache(config, 32)):
        told = f"must cache cross-attention in an EncoderDecoderCache, got {type(cache).__name__}"
        for spec in SPECS:
            with (
                kvprune.compress(models[name], spec) as run,
                pytest.raises(UnsupportedCacheError, match=told),
            ):
                read(models[name], (states,), past_key_values=cache)
            assert run.report.prefills == 0


@pytest.mark.parametrize("name", ALL)
def test_an_empty_cache_passed_by_hand_equals_the_oracle(models: Any, name: str) -> None:
    states = (encoded(name, models[name]),)
    model = models[name]
    for spec in SPECS:
        with kvprune.compress(model, spec) as run:
            logits = read(model, states, past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()))
        with masked_oracle(model, run.selections, run.prefill_selections):
            wanted = read(model, states)
        assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max(), spec


# Models whose class matches, and whose layers do not look as expected.


def test_a_layer_without_the_attention_of_the_others_is_refused() -> None:
    """It would attend to all columns, whatever a policy keeps."""
    model = tiny_bart()
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    model.get_decoder().layers[1].encoder_attn = attention
    with pytest.raises(
        UnsupportedModelError,
        match=r"decoder.layers.2.encoder_attn, but not so at model.decoder.layers.1.encoder_attn "
        r"\(MultiheadAttention\): its forward takes no cache",
    ):
        kvprune.compress(model, "norm")


@pytest.mark.parametrize("name", [BART, T5, M2M100, WHISPER, VISION])
def test_a_class_of_ones_own_is_inspected(name: str) -> None:
    """It is supported if it is derived from a supported class, and refused if its attention is gone."""
    model = TINY_FAMILIES[name].model(name, attn_implementation="eager")
    model.__class__ = type("Mine", (type(model),), {})
    kvprune.compress(model, "norm")
    for path, module in list(model.named_modules()):
        if "decoder" in path and path.endswith(("encoder_attn", "EncDecAttention", "crossattention")):
            parent, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(parent), attribute, nn.Linear(32, 32))
            assert module.layer_idx is not None
    with pytest.raises(
        UnsupportedModelError, match=r"no cross-attention with a cache in this Mine .*\(Linear\)"
    ):
        kvprune.compress(model, "norm")


# Two compressions of one model.


def test_a_second_compression_in_a_thread_is_refused(models: Any) -> None:
    model, raised = models[BART], list[BaseException]()

    def compress() -> None:
        try:
            with kvprune.compress(model, "trim"):
                pass
        except CompressionStateError as error:
            raised.append(error)

    with kvprune.compress(model, "norm:keep_ratio=0.5") as run:
        thread = threading.Thread(target=compress)
        thread.start()
        thread.join(60)
        read(model, (encoded(BART, model),))
    assert [type(error) for error in raised] == [NestedCompressionError]
    assert "BartForConditionalGeneration is being compressed already" in str(raised[0])
    assert run.report.prefills == 1
