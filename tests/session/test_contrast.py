"""Contrast equals a slow reference that reads each whole prefix twice, without caches."""

from __future__ import annotations

import pytest
import torch
from contrast_reference import SlowContrast
from families import inputs_of, model_of

import kvprune

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


THRESHOLD = 0.02
"""So that branches agree in some rows."""

RULES = {"mint": mint, f"mod:threshold={THRESHOLD}": mod}


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
    slow = SlowContrast(model, inputs, run, RULES[combine], repeats)
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
