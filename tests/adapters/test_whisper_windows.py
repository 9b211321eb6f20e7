"""Whisper's windows: what is recorded and reported, what is drawn again, and which cache is given back."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from long_speech import long_features, long_whisper, transcribe

import kvprune
from kvprune.errors import SelectionError
from kvprune.testing import masked_oracle


@pytest.fixture(scope="module")
def model():
    return long_whisper()


def test_only_a_recording_keeps_earlier_selections(model):
    with kvprune.compress(model, "norm:keep_ratio=0.5") as run:
        with run.recording() as kept:
            transcribe(model, "long")
            assert len(kept) == run.report.prefills > 1
            with run.recording() as inner:
                transcribe(model, "short")
            assert list(kept[-len(inner) :]) == list(inner)
        before = len(kept)
        transcribe(model, "long")
        assert len(kept) == before
    assert kept[0].selections != kept[1].selections  # each window is decided anew


def test_windows_are_those_of_the_latest_generate(model):
    with kvprune.compress(model, "trim:keep_ratio=0.5") as run:
        transcribe(model, "long")
        count = len(run.report.windows)
        transcribe(model, "long")
        assert run.report.prefills == 2 * count
        assert len(run.report.windows) == count > 1
        for window in run.report.windows:
            assert window.kept_per_sample == pytest.approx((0.5,))
            assert window.bytes_held == window.bytes_full // 2
            assert window.bytes_peak >= window.bytes_held
        data = run.report.to_dict()["windows"]
        assert json.loads(json.dumps(data)) == data
        assert [one["starts"] for one in data] == [list(one.starts) for one in run.report.windows]
        states = torch.randn(1, 8, 100, dtype=torch.float64)
        with torch.no_grad():
            model(input_features=states, decoder_input_ids=torch.tensor([[3, 5]]))
        assert run.report.windows == ()  # a call by hand


def test_a_window_that_is_tried_again_is_decided_alike(model):
    """Also by a policy that draws: it draws from the seed and the window, not from the number of the try."""
    for spec in ("random:keep_ratio=0.5", "norm:keep_ratio=0.5"):
        with kvprune.compress(model, spec, seed=4) as run, run.recording() as kept:
            transcribe(model, "fallback", condition_on_prev_tokens=False)
        first = {}
        for window, one in zip(run.report.windows, kept, strict=True):
            for number, place in enumerate(zip(window.rows, window.starts, strict=True)):
                mask = one.selections[1].to_mask()[number]
                assert torch.equal(first.setdefault(place, mask), mask)
        assert any(window.attempt for window in run.report.windows)


def test_the_oracle_wants_as_many_selections_as_there_are_prefills(model):
    with kvprune.compress(model, "norm:keep_ratio=0.5") as run, run.recording() as kept:
        transcribe(model, "long")
    decode = [one.selections for one in kept]
    prefill = [one.prefill_selections for one in kept]
    few = masked_oracle(model, decode[:1], prefill[:1])
    with pytest.raises(SelectionError, match="for 1 prefills, but another one begins"), few:
        transcribe(model, "long")
    many = masked_oracle(model, [*decode, decode[0]], [*prefill, prefill[0]])
    with pytest.raises(SelectionError, match=rf"for {len(kept) + 1} prefills, but {len(kept)} ran"), many:
        transcribe(model, "long")
    with pytest.raises(SelectionError, match="pass one mapping of each"):
        masked_oracle(model, decode, prefill[:1]).__enter__()
    assert not {"detect_language", "_retrieve_logit_processors"} & vars(model).keys()
    assert run.report.prefills == len(kept)


@pytest.mark.parametrize("spec", ["full", "norm:keep_ratio=0.5", "adakv:keep_ratio=0.4", "zipvl"])
def test_generation_continues_from_a_returned_cache(model, spec):
    """Whisper copies the cache row by row, without its flags; a ragged one must be returned itself."""
    features = long_features(100, 100)["input_features"]
    options = {"language": "en", "max_new_tokens": 4, "return_dict_in_generate": True}
    with kvprune.compress(model, spec) as run:
        out = model.generate(features, **options, force_unique_generate_call=True)
        assert not run.report.warnings
        states = model.get_encoder()(features).last_hidden_state
        call = {"encoder_outputs": (states,), "decoder_input_ids": torch.tensor([[7], [8]])}
        with torch.no_grad():
            found = model(**call, past_key_values=copy.deepcopy(out["past_key_values"])).logits
    with torch.no_grad(), masked_oracle(model, run.selections, run.prefill_selections):
        exact = model.generate(features, **options, force_unique_generate_call=True)
        expected = model(**call, past_key_values=exact["past_key_values"]).logits
    assert (found - expected).abs().max() <= 1e-9


def test_a_copy_of_a_ragged_cache_is_left_out(model):
    for use, options in (("short", {}), ("words", {"num_beams": 2})):
        with kvprune.compress(model, "adakv:keep_ratio=0.4") as run:
            out = transcribe(model, use, **options)
        for segment in out.get("segments", [[]])[0]:
            assert segment["result"].get("past_key_values") is None
        assert out.get("past_key_values") is None
        assert any("past_key_values is left out" in warning for warning in run.report.warnings)


def test_what_whisper_replaces_is_restored():
    model = long_whisper()
    before = dict(vars(model))
    with kvprune.compress(model, "norm:keep_ratio=0.5"):
        transcribe(model, "silence")
        assert copy.deepcopy(model).detect_language.around is None  # the plain method in copies
    assert dict(vars(model)) == before
