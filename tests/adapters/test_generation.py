"""What `generate` says about the call that runs, and how assisted decoding begins."""

from __future__ import annotations

import copy

import pytest
import torch
from generation import bart, mllama
from transformers import GenerationMixin

import kvprune
from kvprune.adapters import generation
from kvprune.adapters.generation import Generation, probe_generation, running_generation
from kvprune.errors import UnsupportedModelError
from kvprune.testing import mllama_inputs


def said(model, part, call):
    """Return what is known each time that a part of a model is called."""
    found = []
    hook = part.register_forward_pre_hook(lambda *_: found.append(running_generation(model)))
    try:
        call()
    finally:
        hook.remove()
    return found


IDS = torch.arange(4, 13)[None]


@pytest.mark.parametrize(
    ("options", "repeats"),
    [
        ({}, 1),
        ({"num_beams": 3}, 3),
        ({"num_return_sequences": 2, "do_sample": True}, 2),
        ({"num_beams": 4, "num_return_sequences": 2}, 4),
    ],
)
def test_samples_are_repeated_for_beams_and_return_sequences(options, repeats):
    model = bart()
    calls = said(model, model.get_decoder(), lambda: model.generate(IDS, max_new_tokens=2, **options))
    assert set(calls) == {Generation(repeats, prompt=1)}


def test_a_call_by_hand_says_nothing_and_nothing_outlives_generate():
    model = bart()
    model.generate(IDS, num_beams=3, max_new_tokens=1)
    ids = torch.tensor([[2]])
    assert said(model, model.get_decoder(), lambda: model(IDS, decoder_input_ids=ids)) == [Generation()]
    assert running_generation(model) == Generation()


def test_a_part_of_the_model_and_no_other_model_is_meant():
    model, other = mllama(), bart()
    inputs = mllama_inputs(["tt4ttt"])

    def call():
        model.generate(**inputs, num_beams=2, max_new_tokens=1, do_sample=False)

    assert set(said(model.model, model.model, call)) == {Generation(2, prompt=6)}
    assert set(said(other, model.model, call)) == {Generation()}


def test_the_first_drafts_are_rejected_unseen():
    class Drafts:
        def get_candidates(self, ids, **options):
            return torch.cat([ids, ids], dim=1), "logits"

    drafts = generation.prompt_first(lambda *args, **kwargs: Drafts())
    assert drafts.get_candidates(IDS, n_last_matches=0) == (IDS, None)
    assert drafts.get_candidates(IDS)[0].shape == (1, 18)
    assert drafts.get_candidates(IDS)[1] == "logits"


def test_chunks_of_the_prompt_are_refused_by_name():
    Generation(prompt=4).require_whole_prompt("BART")
    Generation(chunk=4, prompt=4).require_whole_prompt("BART")
    with pytest.raises(
        UnsupportedModelError, match="prefill_chunk_size=2 passes the prompt of BART in chunks"
    ):
        Generation(chunk=2, prompt=4).require_whole_prompt("BART")
    with pytest.raises(UnsupportedModelError, match="attention mask is cut"):
        Generation(chunk=4, prompt=4).require_whole_prompt("BART", is_mask_cut=True)


def test_a_prompt_of_one_chunk_is_whole():
    model = bart()
    prompt = torch.tensor([[2, 5, 6]])
    with kvprune.compress(model, "norm:keep_ratio=0.5"):
        whole = model.generate(IDS, decoder_input_ids=prompt, max_new_tokens=4, do_sample=False)
        chunk = {"prefill_chunk_size": 3}
        found = model.generate(IDS, decoder_input_ids=prompt, max_new_tokens=4, do_sample=False, **chunk)
    assert torch.equal(found, whole)


def test_the_probe_names_what_is_missing(monkeypatch):
    assert probe_generation().ok
    monkeypatch.delattr(GenerationMixin, generation.CANDIDATES)
    assert "lacks _get_candidate_generator" in probe_generation().detail
    monkeypatch.setattr(GenerationMixin, "generate", lambda self, input_ids: None)
    probe = probe_generation()
    assert not probe.ok
    assert "generation_config" in probe.detail


def test_methods_are_restored_and_copies_have_their_own():
    model = copy.deepcopy(bart())
    with kvprune.compress(model, "norm"):
        assert generation.CANDIDATES in model.__dict__
        twin = copy.deepcopy(model)
        assert twin.__dict__[generation.CANDIDATES].module is twin
    assert generation.CANDIDATES not in model.__dict__
    plain = bart().generate(IDS, max_new_tokens=6, do_sample=False)
    lookup = twin.generate(IDS, max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=2)
    assert torch.equal(lookup, plain)
