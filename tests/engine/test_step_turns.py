"""Policies that decide in decode steps, in conversations: later images and later turns of text."""

from __future__ import annotations

import pytest
import torch
from generation import generate, mllama
from step_policies import Hashes, ReadsAll, ReadsLogits
from stepping import later_image_like_the_oracle, two_images
from test_steps import copied

import kvprune
from kvprune.errors import PolicyOptionError, UnsupportedCacheError
from kvprune.session.registry import find_adapter
from kvprune.testing import masked_oracle, mllama_inputs
from kvprune.testing.oracle_steps import masked_steps

QUEST = "quest:keep_ratio=0.4,page=2"


@pytest.mark.parametrize(
    "policy", [ReadsAll(), ReadsAll(by="selection"), ReadsLogits(), Hashes(), QUEST], ids=str
)
def test_a_later_image_equals_the_oracle(policy):
    run = later_image_like_the_oracle(policy)
    assert [receipt.steps for receipt in run.report.steps] == [5, 5, 5]  # since the second image


def test_prepare_gets_what_was_known_before():
    seen = []

    def prepare(self, view):
        seen.append((view.earlier, view.columns, view.entries, view.slots.shape[-1]))
        return {"sum": torch.full((len(view.keys),), 7.0, dtype=torch.float64)}

    model, (first, second) = mllama(torch.float64), two_images()
    with kvprune.compress(model, copied(Hashes(), prepare=prepare)), torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
        model(**second, past_key_values=cache)
    assert [earlier for earlier, *_ in seen[:3]] == [None] * 3
    assert all(earlier["sum"].eq(7).all() for earlier, *_ in seen[3:])
    assert {columns for _, columns, *_ in seen[:3]} == {20}
    assert {columns for _, columns, *_ in seen[3:]} == {40}
    assert all(entries == slots for *_, entries, slots in seen)


@pytest.mark.parametrize("policy", [ReadsAll(), ReadsLogits(), QUEST], ids=str)
def test_a_later_turn_of_text_equals_the_oracle(policy):
    """Each of its tokens chooses for itself, in one call."""
    model, whole = mllama(torch.float64), mllama_inputs(("tt4tttttt", "1tttttttt"), dtype=torch.float64)
    of_text = ("input_ids", "attention_mask", "cross_attention_mask")
    first = {name: tensor[:, :5] if name in of_text else tensor for name, tensor in whole.items()}
    second = {name: whole[name] for name in of_text}
    with kvprune.compress(model, policy) as run, torch.no_grad():
        run.record_steps()
        cache = model(**first, use_cache=True).past_key_values
        _, logits, _ = generate(model, second, past_key_values=cache)
    sites = find_adapter(model)(model).sites
    oracle = masked_oracle(model, run.selections, run.prefill_selections)
    with oracle, masked_steps(sites, run.step_reads), torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
        _, expected, _ = generate(model, second, past_key_values=cache)
    assert (logits - expected).abs().max() <= 1e-6


def test_what_observing_policies_refuse():
    model, (first, second) = mllama(torch.float64), two_images()
    with kvprune.compress(model, "h2o:steps=2"), torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
        with pytest.raises(PolicyOptionError, match="cannot take a later one"):
            model(**second, past_key_values=cache)
    text = {"input_ids": torch.full((2, 3), 9), "cross_attention_mask": first["cross_attention_mask"][:, -3:]}
    with kvprune.compress(model, Hashes()), torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
        with pytest.raises(UnsupportedCacheError, match="this call reads 3 tokens at once"):
            model(**text, past_key_values=cache)
