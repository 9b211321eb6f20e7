"""Samples that are nothing but padding: they keep a token, and the others of their batch are as without."""

from __future__ import annotations

import pytest
import torch
from anywhere import on_any_model

import kvprune
from kvprune.adapters.families.texts import BartAdapter
from kvprune.adapters.mllama import MllamaAdapter
from kvprune.errors import UnsupportedModelError

QUICK = ("full", "lossless", "norm", "divprune")
POLICIES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in kvprune.list_policies()
    if not on_any_model(name).reads_answer  # each sample would need an answer
]


def generate(model, inputs, name, **options):
    """Return tokens and the compression; skip what the family cannot provide."""
    try:
        compression = kvprune.compress(model, on_any_model(name))
    except UnsupportedModelError as error:
        pytest.skip(str(error))
    with compression as run:
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=3, **options)
    return tokens, run


@pytest.mark.parametrize("adapter", [BartAdapter, MllamaAdapter], ids=["bart", "mllama"])
@pytest.mark.parametrize("name", POLICIES)
def test_other_samples_are_as_without_it(name, adapter):
    model, inputs = adapter.example(torch.float64)
    batch = {key: torch.cat([value[:1], value]) for key, value in inputs.items()}  # once more, in front
    batch["attention_mask"][0] = 0
    together, run = generate(model, batch, name)
    expected, apart = generate(model, inputs, name)
    assert torch.equal(together[1:], expected)
    for layer_idx, selection in apart.selections.items():
        assert torch.equal(run.selections[layer_idx].to_mask()[1:], selection.to_mask())
        assert run.selections[layer_idx].to_mask()[0].any(-1).all()


@pytest.mark.parametrize("adapter", [BartAdapter, MllamaAdapter], ids=["bart", "mllama"])
def test_a_batch_of_nothing_but_padding_runs(adapter):
    model, inputs = adapter.example(torch.float64)
    inputs["attention_mask"] = torch.zeros_like(inputs["attention_mask"])
    tokens, run = generate(model, inputs, "trim", num_beams=2)
    assert len(tokens) == len(inputs["attention_mask"])
    assert all(selection.valid.any(-1).all() for selection in run.selections.values())
