"""Contrast equals a slow reference that reads each whole prefix twice, without caches."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from contrast_reference import SlowContrast
from families import inputs_of, model_of
from long_speech import USES, long_whisper

import kvprune
from kvprune.adapters.families.pictures import BlipAdapter, Florence2Adapter
from kvprune.adapters.families.speech import MoonshineStreamingAdapter
from kvprune.adapters.families.texts import T5Adapter, T5GemmaAdapter
from kvprune.errors import UnsupportedModelError

STEPS = 5
FAMILIES = "BART", "Whisper", "Mllama"
SPECS = "divprune:keep_ratio=0.2", "trim:keep_ratio=0.3", "norm:keep_ratio=0.3"
"""Pruned before prefill, in prefill by heads together, after prefill by each head."""


def mint(full, pruned, decided, alpha=1.0, beta=0.1):
    scores = (1 + alpha) * pruned - alpha * full
    return torch.where(full.exp() >= beta * full.exp().amax(-1, keepdim=True), scores, -torch.inf), None


def mod(full, pruned, decided):
    if decided is None:
        p, q = full.exp(), pruned.exp()
        middle = (p + q) / 2
        divergence = 0.5 * ((p * (p / middle).log()).sum(-1) + (q * (q / middle).log()).sum(-1))
        decided = divergence < THRESHOLD
    scores = torch.where(decided[:, None], full + 4 * pruned, 2 * full - pruned)
    return torch.where(full.exp() >= 0.5 * full.exp().amax(-1, keepdim=True), scores, -torch.inf), decided


def opposite(full, pruned, decided):
    return 1.5 * full - 0.5 * pruned, None


THRESHOLD = 0.02
"""So that branches agree in some rows."""

KVZIP = "kvzip:keep_ratio=0.3,max_new_tokens=4"
"""Repeats the text that the encoder has read in the first branch, or describes its picture."""

RULES = {"mint": mint, f"mod:threshold={THRESHOLD}": mod}
OPPOSITE = "mint:alpha=0.5,beta=0,expert=full"


def prompted(family):
    """Return inputs whose prompt has several tokens."""
    inputs = inputs_of(family)
    if family == "Mllama":
        return inputs
    rows = len(next(iter(inputs.values())))
    random = torch.Generator().manual_seed(1)
    return inputs | {"decoder_input_ids": torch.randint(4, 50, (rows, 3), generator=random)}


def generate(model, inputs, **options):
    torch.manual_seed(0)
    options = {"do_sample": False, "max_new_tokens": STEPS, "output_scores": True} | options
    return model.generate(**inputs, return_dict_in_generate=True, **options)


def both(family, spec, combine, repeats=1, **options):
    """Return what contrast and the slow reference generate, and the contrast."""
    model, inputs = model_of(family), prompted(family)
    if family == "Whisper" and "num_return_sequences" in options:
        del inputs["decoder_input_ids"]  # stock repeats recordings, but not the prompt
    with kvprune.contrast(model, spec, combine) as run:
        fast = generate(model, inputs, **options)
    slow = SlowContrast(model, inputs, run, {**RULES, OPPOSITE: opposite}[combine], repeats)
    return fast, generate(model, inputs, logits_processor=[slow], **options), run


def assert_equal(fast, slow):
    assert torch.equal(fast.sequences, slow.sequences)
    for one, other in zip(fast.scores, slow.scores, strict=True):
        assert torch.equal(one.isneginf(), other.isneginf())
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("combine", RULES)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_equals_the_slow_reference(family, spec, combine):
    fast, slow, run = both(family, spec, combine)
    assert_equal(fast, slow)
    assert run.report.steps == STEPS
    assert run.report.against.kept_fraction < 0.6


@pytest.mark.parametrize("combine", RULES)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", FAMILIES)
def test_beams_equal_the_slow_reference(family, spec, combine):
    fast, slow, _ = both(family, spec, combine, 3, num_beams=3)
    assert_equal(fast, slow)


@pytest.mark.parametrize("combine", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_several_sequences_equals_the_slow_reference(family, combine):
    options = {"do_sample": True, "num_return_sequences": 2, "top_k": 0}
    fast, slow, _ = both(family, "trim:keep_ratio=0.3", combine, 2, **options)
    assert_equal(fast, slow)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_opposite_sign_equals_the_slow_reference(family):
    fast, slow, _ = both(family, "norm:keep_ratio=0.3", OPPOSITE)
    assert_equal(fast, slow)


@dataclass(frozen=True, kw_only=True)
class Pruned(kvprune.CombineRule):
    """Only the second branch speaks."""

    name = "pruned"

    def combine(self, full, pruned, decided):
        return pruned


def under_both(model, inputs, spec, **options):
    """Return what a model generates under a policy, and in a contrast where only the second branch speaks."""
    with kvprune.compress(model, spec, reread=True):
        alone = generate(model, inputs, **options)
    with kvprune.contrast(model, spec, Pruned()):
        return alone, generate(model, inputs, **options)


@pytest.mark.parametrize(
    "spec",
    [
        "elastic:keep_ratio=0.3",
        "csp:keep_ratio=0.3",
        "guided:keep_ratio=0.3",
        "quest:keep_ratio=0.3,page=2",
        "h2o:keep_ratio=0.3,steps=3",
        KVZIP,
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_second_branch_is_the_compressed_model(family, spec):
    alone, second = under_both(model_of(family), prompted(family), spec)
    assert torch.equal(alone.sequences, second.sequences)
    for one, other in zip(alone.scores, second.scores, strict=True):
        torch.testing.assert_close(one.log_softmax(-1), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [T5Adapter, BlipAdapter, Florence2Adapter, T5GemmaAdapter])
@pytest.mark.parametrize("beams", [1, 2])
def test_other_families_have_the_same_second_branch(kind, beams):
    model, inputs = kind.example(torch.float64)
    alone, second = under_both(model, inputs, "trim:keep_ratio=0.3", num_beams=beams)
    assert torch.equal(alone.sequences, second.sequences)


@pytest.mark.parametrize("family", ["Mllama", "BART"])
def test_a_reconstruction_of_beams_is_that_of_the_compressed_model(family):
    alone, second = under_both(model_of(family), prompted(family), KVZIP, num_beams=2)
    assert torch.equal(alone.sequences, second.sequences)


def test_the_second_branch_knows_where_patches_lie():
    model, inputs = BlipAdapter.example(torch.float64)
    alone, second = under_both(model, inputs, "snapkv:keep_ratio=0.3,pool=2d")
    assert torch.equal(alone.sequences, second.sequences)


def test_a_model_that_changes_encoder_states_is_refused():
    model, inputs = MoonshineStreamingAdapter.example(torch.float64)
    with (
        kvprune.contrast(model, "trim:keep_ratio=0.3", "mint"),
        pytest.raises(UnsupportedModelError, match="in place"),
    ):
        model.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("use", ["long", "detection", "beams", "fallback"])
def test_each_window_of_a_recording_has_its_own_second_branch(use):
    model, (inputs, options) = long_whisper(), USES[use]
    options = {"return_timestamps": True, "language": "en", "task": "transcribe", **options}

    def transcribed():
        torch.manual_seed(0)
        return model.generate(**inputs, **options)

    with kvprune.compress(model, "trim:keep_ratio=0.3", reread=True) as run:
        alone = transcribed()
    with kvprune.contrast(model, "trim:keep_ratio=0.3", Pruned()) as contrast:
        second = transcribed()
    assert torch.equal(alone, second)
    assert contrast.report.generations == run.report.prefills > 1
