"""Contrast on every declared family that generates: both branches are what they would be alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from contrast_reference import SlowContrast
from decoder_pairs import PAIRS
from family_checks import hardest_of, installed, tiny_of

import kvprune
from kvprune.adapters.tiny.families import TINY_FAMILIES
from kvprune.errors import ContrastError, UnsupportedModelError

FEATURES, PREFILL = "divprune:keep_ratio=0.3", "trim:keep_ratio=0.3"

NOT_REREAD = {
    "DiaForConditionalGeneration": ContrastError,
    "ProphetNetForConditionalGeneration": ContrastError,
    "EncoderDecoderModel of ProphetNet": UnsupportedModelError,
}
"""Classes whose second branch cannot follow a policy that decides in prefill, and what is raised."""

CHANGES_STATES = "MoonshineStreamingForConditionalGeneration"

SOME = (
    "T5ForConditionalGeneration",
    "LEDForConditionalGeneration",
    "EncoderDecoderModel of GPT-2",
    "DiaForConditionalGeneration",
    "MusicgenForConditionalGeneration",
    "ProphetNetForConditionalGeneration",
    "MoonshineForConditionalGeneration",
    "Pop2PianoForConditionalGeneration",
    "Florence2ForConditionalGeneration",
    "UdopForConditionalGeneration",
    "BlipForConditionalGeneration",
)
"""Classes that differ most in how they call their layers; the slow tests below have all."""

NOT_BY_PREFIX = {
    "DiaForConditionalGeneration": "its prompt is delayed by codebook",
    "MusicgenForConditionalGeneration": "its prompt has a row for each codebook",
    "BlipForConditionalGeneration": "its generate is that of its text decoder",
    "Pop2PianoForConditionalGeneration": "its generate lengthens what the encoder reads",
    "EncoderDecoderModel of ProphetNet": "stock cannot mask its streams one by one",
    "ProphetNetForConditionalGeneration": "stock cannot mask its streams one by one",
}
"""Classes that the reference, which calls the model itself with whole prefixes, cannot read, and why."""


@dataclass(frozen=True, kw_only=True)
class One(kvprune.CombineRule):
    """Only one branch speaks."""

    name = "one"
    second: bool

    def combine(self, full, pruned, decided):
        return pruned if self.second else full


def made(name):
    tiny, (attention, padded, _) = tiny_of(name), hardest_of(name)
    model, inputs = tiny.model(name, torch.float32, attention), tiny.batch(torch.float32, padded)
    return model, inputs, {"guidance_scale": 1.0} if name.startswith("Musicgen") else {}


def generate(model, inputs, **options):
    options = {"max_new_tokens": 3, "do_sample": False, "output_scores": True} | options
    return model.generate(**inputs, return_dict_in_generate=True, **options)


def assert_same(one, other):
    assert torch.equal(one.sequences, other.sequences)
    for mine, theirs in zip(one.scores, other.scores, strict=True):
        torch.testing.assert_close(
            mine.float().log_softmax(-1), theirs.float().log_softmax(-1), rtol=2e-4, atol=2e-4
        )


def assert_both(name, spec, beams=1):
    """Compare each branch of a contrast with a compressed and with the untouched model."""
    model, inputs, options = made(name)
    with kvprune.compress(model, spec, reread=spec == PREFILL):
        alone = generate(model, inputs, num_beams=beams, **options)
    with kvprune.contrast(model, spec, One(second=True)) as run:
        assert_same(generate(model, inputs, num_beams=beams, **options), alone)
    assert run.report.steps == len(alone.scores)
    assert run.report.kept_fraction < 1
    with kvprune.contrast(model, spec, One(second=False)):
        first = generate(model, inputs, num_beams=beams, **options)
    assert torch.equal(first.sequences, generate(model, inputs, num_beams=beams, **options).sequences)


@pytest.mark.parametrize("name", installed(SOME))
def test_both_branches_of_a_class_are_what_they_are_alone(name):
    assert_both(name, FEATURES)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [FEATURES, PREFILL])
@pytest.mark.parametrize("name", installed([*TINY_FAMILIES, *PAIRS]))
def test_both_branches_of_a_class_with_the_beams_that_it_has(name, spec):
    if name == CHANGES_STATES or (spec == PREFILL and name in NOT_REREAD):
        pytest.skip("refused, see below")
    assert_both(name, spec, beams=3 if tiny_of(name).beams else 1)


def mint(full, pruned, decided):
    scores = 2 * pruned - full
    return torch.where(full.exp() >= 0.1 * full.exp().amax(-1, keepdim=True), scores, -torch.inf), None


@pytest.mark.slow
@pytest.mark.parametrize("spec", [FEATURES, PREFILL])
@pytest.mark.parametrize("name", installed([*TINY_FAMILIES, *PAIRS]))
def test_a_class_equals_the_slow_reference(name, spec):
    if name == CHANGES_STATES or name in NOT_BY_PREFIX:
        pytest.skip(NOT_BY_PREFIX.get(name, "refused, see below"))
    model, inputs, options = made(name)
    with kvprune.contrast(model, spec, "mint") as run:
        fast = generate(model, inputs, **options)
    slow = generate(model, inputs, logits_processor=[SlowContrast(model, inputs, run, mint)], **options)
    assert_same(fast, slow)


@pytest.mark.parametrize("name", installed(NOT_REREAD))
def test_a_class_that_reads_no_token_again_is_refused(name):
    model, inputs, _ = made(name)
    with pytest.raises(NOT_REREAD[name]), kvprune.contrast(model, PREFILL, "mint"):
        generate(model, inputs)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", installed([CHANGES_STATES]))
def test_a_class_that_changes_encoder_states_in_place_is_refused(name, mode):
    model, inputs, _ = made(name)
    with (
        mode(),
        kvprune.contrast(model, FEATURES, "mint"),
        pytest.raises(UnsupportedModelError, match="in place"),
    ):
        generate(model, inputs)


@pytest.mark.parametrize("name", ["MusicgenForConditionalGeneration"])
def test_guidance_of_a_class_is_refused_before_a_layer_runs(name):
    model, inputs, _ = made(name)
    calls = []
    handle = model.decoder.register_forward_pre_hook(lambda *call: calls.append(1))
    with (
        kvprune.contrast(model, FEATURES, "mint"),
        pytest.raises(ContrastError, match="guidance_scale=1"),
    ):
        generate(model, inputs, guidance_scale=3.0)
    handle.remove()
    assert not calls
