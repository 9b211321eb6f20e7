"""Inputs that `generate` is less often given: encoder outputs, embeddings, padded rows with beams."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from family_checks import BY_HEAD, MOST, ONWARD, apart, equals_oracle, largest, tiny_of
from generation import generate

import kvprune
from kvprune.session.registry import find_adapter
from kvprune.testing import masked_oracle

SPECS = (*BY_HEAD, *ONWARD)
BEAMS = {"num_beams": 3, "num_return_sequences": 2}
TEXTS = ("T5ForConditionalGeneration", "M2M100ForConditionalGeneration", "LEDForConditionalGeneration")
SOUNDS = ("MoonshineForConditionalGeneration", "CohereAsrForConditionalGeneration")
PICTURES = ("VisionEncoderDecoderModel of mBART", "PPFormulaNetForConditionalGeneration")


def made(name: str) -> tuple[Any, dict[str, Any]]:
    """Return a model and a batch, padded if the encoder knows padding."""
    tiny = tiny_of(name)
    return tiny.model(name, attn_implementation="sdpa" if tiny.sdpa else "eager"), tiny.batch(
        torch.float32, tiny.pads
    )


@pytest.mark.parametrize("name", [TEXTS[0], SOUNDS[0], "Florence2ForConditionalGeneration"])
def test_beams_and_return_sequences_of_padded_samples_equal_the_oracle(name: str) -> None:
    model, inputs = made(name)
    assert (inputs["attention_mask"] == 0).any()
    for spec in SPECS:
        equals_oracle(name, model, inputs, spec, **BEAMS)


@pytest.mark.parametrize("options", [{}, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", [TEXTS[0], *SOUNDS, *PICTURES])
def test_encoder_outputs_by_hand_generate_what_their_input_does(name: str, options: dict[str, Any]) -> None:
    model, inputs = made(name)
    with torch.no_grad():
        encoded = model.get_encoder()(**inputs)
    given = {key: inputs[key] for key in ("attention_mask",) if key in inputs}
    for spec in SPECS:
        with kvprune.compress(model, spec) as run:
            _, expected, _ = generate(model, inputs, 4, **options)
        held = run.report.bytes_held
        with kvprune.compress(model, spec) as run:  # a copy, because `generate` repeats its rows for beams
            _, logits, _ = generate(model, {**given, "encoder_outputs": copy.copy(encoded)}, 4, **options)
        assert torch.equal(logits, expected), spec
        assert run.report.bytes_held == held < run.report.bytes_full


@pytest.mark.parametrize("options", [{}, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", TEXTS)
def test_embeddings_for_the_encoder_equal_the_oracle(name: str, options: dict[str, Any]) -> None:
    model, inputs = made(name)
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    for spec in SPECS:
        equals_oracle(name, model, {**inputs, "inputs_embeds": embeddings}, spec, **options)


@pytest.mark.parametrize("name", [TEXTS[0], TEXTS[1], SOUNDS[0]])
def test_embeddings_for_the_decoder_equal_the_oracle(name: str) -> None:
    model, inputs = made(name)
    tokens = torch.randint(4, 60, (2, 5), generator=torch.Generator().manual_seed(1))
    embeddings = model.get_decoder().get_input_embeddings()(tokens).detach()
    given = {key: inputs[key] for key in ("attention_mask",) if key in inputs}

    @torch.no_grad()
    def logits() -> torch.Tensor:
        call = {**given, "encoder_outputs": model.get_encoder()(**inputs), "use_cache": True}
        first = model(**call, decoder_inputs_embeds=embeddings)
        second = model(**call, decoder_input_ids=tokens[:, :1], past_key_values=first.past_key_values)
        return torch.cat([first.logits, second.logits], dim=1)

    for spec in SPECS:
        with kvprune.compress(model, spec) as run:
            found = logits()
        with masked_oracle(model, run.selections, run.prefill_selections, adapter=find_adapter(model)):
            expected = logits()
        assert apart(found, expected) <= MOST * largest(expected), spec
        assert run.report.bytes_held < run.report.bytes_full
