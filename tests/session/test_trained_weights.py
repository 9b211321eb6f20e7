"""Trained weights of a policy in a run: which models they fit, what reports say of them, and lost files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from families import inputs_of, model_of
from generation import bart, generate, mllama, whisper
from kvprune_strategies.attnpred import AttnPred
from kvprune_strategies.quecc import QueCC
from saved_caches import LAYOUT, answer, questions

import kvprune
from kvprune.adapters.sites import geometry_of
from kvprune.errors import SavedCacheError, WeightsError
from kvprune.policy.weights import save_weights
from kvprune.session.registry import find_adapter
from kvprune.testing import mllama_inputs


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def weights_for(path: Path, model, **options) -> str:
    """Write weights of quecc that fit a model, with a compressor that does something; return the spec."""
    policy = QueCC(weights="fresh", k=2, **options)
    geometry = geometry_of(find_adapter(model)(model).sites)
    tensors = {**policy.initial(geometry), "gamma": torch.full((1,), 0.5)}
    save_weights(path, policy, tensors, geometry, {"model": "a tiny model"})
    return f"quecc:weights={path},k=2"


@pytest.mark.parametrize("family", ["Mllama", "BART", "Whisper"])
def test_modules_tell_what_a_view_shows(family, monkeypatch):
    model, seen = model_of(family), []
    told = geometry_of(find_adapter(model)(model).sites)
    policy = "quecc:weights=fresh,query=none" if family != "Mllama" else "quecc:weights=fresh"
    original = QueCC.initial

    def initial(self, geometry):
        seen.append(dict(geometry))
        return original(self, geometry)

    monkeypatch.setattr(QueCC, "initial", initial)
    with kvprune.compress(model, policy):
        generate(model, inputs_of(family), steps=1)
    assert seen
    for shown in seen:
        assert shown.items() <= told.items()


def test_weights_of_another_geometry_are_refused_before_anything_runs(tmp_path):
    file = tmp_path / "w.safetensors"
    spec = weights_for(file, mllama())
    text = file.read_bytes().replace(b'\\"feature_width\\": 32', b'\\"feature_width\\": 31')
    file.write_bytes(text)
    with pytest.raises(
        WeightsError,
        match=r"trained for a model of feature_width 31 \(a tiny model\), but this model has 32; train them "
        r"for it \(kvprune train quecc:k=2,query=prompt --model MODEL .*, or take weights=fresh",
    ):
        kvprune.compress(mllama(), spec)
    with pytest.raises(WeightsError, match=r"of feature_width 96 \(embedded demo\), but this model has 32"):
        kvprune.compress(mllama(), "quecc then h2o")


@pytest.mark.parametrize("make", [mllama, bart, whisper])
def test_a_report_says_on_which_model_weights_were_trained(make):
    run = kvprune.compress(make(), "attnpred")
    (said,) = run.report.weights
    assert said == (
        f"weights demo of attnpred (digest {run.policy.digest}): trained on the embedded model "
        "(attnpred also comes with weights=whisper-base, trained on whisper-base)"
    )
    assert run.report.to_dict()["weights"] == [said]
    assert kvprune.compress(make(), "attnpred:predictor=last").report.weights == ()
    assert kvprune.compress(make(), "trim").report.weights == ()


def test_the_text_of_a_report_names_weights_that_are_untrained():
    model = mllama()
    with kvprune.compress(model, "quecc:weights=fresh then h2o:keep_ratio=0.5") as run:
        generate(model, mllama_inputs(["1tt"]), steps=1)
    assert "\nweights fresh of quecc: untrained\n" in str(run.report)


@pytest.mark.parametrize("after", ["", " then keydiff:keep_ratio=0.5"])
@pytest.mark.parametrize("lost", ["gone", "changed"])
def test_a_saved_cache_is_asked_without_the_weights_that_pruned_it(tmp_path, after, lost):
    model, inputs, file = mllama(), mllama_inputs(LAYOUT, dtype=torch.float32), tmp_path / "w.safetensors"
    spec = weights_for(file, model) + after
    path = tmp_path / "a.safetensors"
    with kvprune.compress(model, spec) as run:
        run.save(model(**inputs).past_key_values, path, inputs)
    saved = kvprune.load_cache(path, model)
    with kvprune.compress(model, saved):
        expected = answer(model, saved.inputs(questions(3)))
    if lost == "gone":
        file.unlink()
    else:
        weights_for(file, model, query="none")
    again = kvprune.load_cache(path, model)
    assert again.policy.spec == run.policy.spec
    with kvprune.compress(model, again) as later:
        assert all(map(torch.equal, answer(model, again.inputs(questions(3))), expected))
    assert "their file is gone, or has changed" in str(later.report)
    with (
        kvprune.compress(model, again),
        pytest.raises(WeightsError, match=r"no file of weights|have changed"),
    ):
        model(**inputs)  # another picture needs them
    with pytest.raises(WeightsError, match=r"no file of weights|trained with query"):
        kvprune.get_policy(run.policy.spec)


def test_a_cache_whose_decode_steps_need_lost_weights_is_refused(tmp_path):
    file, path = tmp_path / "w.safetensors", tmp_path / "a.safetensors"
    shutil.copy(AttnPred(keep_ratio=0.5).weights_path, file)
    model, inputs = mllama(), mllama_inputs(LAYOUT, dtype=torch.float32)
    with kvprune.compress(model, f"attnpred:weights={file},keep_ratio=0.5") as run:
        run.save(model(**inputs).past_key_values, path, inputs)
    kvprune.load_cache(path, model)
    file.unlink()
    right = (
        rf"needs its weights in each decode step; put the file with the digest {run.policy.digest} back to "
    )
    with pytest.raises(SavedCacheError, match=right):
        kvprune.load_cache(path, model)
