"""Saved caches: what is asked of a loaded one equals the same conversation without a file, bit by bit."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import inputs_of, model_of
from saved_caches import answer, by_hand, questions, saved_mllama

import kvprune
from kvprune.errors import UnsupportedCacheError


def slow(spec):
    return pytest.param(spec, marks=pytest.mark.slow)


WAYS = {"greedy": {}, "beams": {"num_beams": 3}, "sampling": {"do_sample": True}}
SPECS = (
    "full",  # nothing pruned: masks hide padding tiles
    slow("keydiff:keep_ratio=0.3"),
    "adakv:keep_ratio=0.3",  # by KV head (GQA), ragged
    slow("divprune:keep_ratio=0.3"),
    "elastic:keep_ratio=0.3",  # merged
    slow("prumerge"),  # merged features
    "zipvl",  # quantized
    "meanpool:keep_ratio=0.3",  # new tokens
    "quest",  # decides in decode steps, with state
    "csp",  # prunes text, too
)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("spec", SPECS)
def test_a_picture_is_asked_as_if_it_had_not_been_saved(tmp_path, spec):
    model, inputs, run, cache, saved = saved_mllama(tmp_path / "a.safetensors", spec)
    expected = {}
    with kvprune.compress(model, spec, seed=5):
        for seed, (name, way) in enumerate(WAYS.items()):
            arguments = by_hand(inputs, cache, questions(3, seed), way.get("num_beams", 1))
            expected[name] = answer(model, arguments, **way)
    with kvprune.compress(model, saved) as later:
        for _ in range(2):  # a question changes nothing for the next one
            for seed, (name, way) in enumerate(WAYS.items()):
                found = answer(model, saved.inputs(questions(3, seed), **way))
                assert all(map(torch.equal, found, expected[name])), (spec, name)
    report, before = later.report, run.report
    assert later.selections == run.selections == saved.selections
    assert later.prefill_selections == run.prefill_selections
    assert later.text_selections == run.text_selections
    assert report.verify() == before.bytes_held == saved.bytes_held
    assert (report.bytes_full, report.kept_per_sample) == (before.bytes_full, before.kept_per_sample)
    assert report.kept_fraction == before.kept_fraction
    assert (report.encoder_inputs, report.prefills, report.loaded) == (0, 0, "a.safetensors")
    assert report.to_dict()["loaded"] == "a.safetensors"
    assert before.to_dict()["loaded"] is None
    assert "loaded from a.safetensors" in str(report)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["BART", "Whisper"])
@pytest.mark.parametrize(
    "spec", ["full", slow("adakv:keep_ratio=0.3"), slow("elastic:keep_ratio=0.3"), "zipvl", "quest"]
)
def test_an_encoder_decoder_is_asked_without_its_encoder(tmp_path, family, spec):
    model, inputs = model_of(family, torch.float32), inputs_of(family, dtype=torch.float32)
    start = torch.full((3, 1), model.config.decoder_start_token_id)
    one = {"force_unique_generate_call": True} if family == "Whisper" else {}
    with kvprune.compress(model, spec) as run:
        cache = model(**inputs, decoder_input_ids=start).past_key_values
        run.save(cache, tmp_path / "b", inputs)
        expected = {}
        for name, way in WAYS.items():
            held = copy.deepcopy(cache)
            held.self_attention_cache = type(held.self_attention_cache)()  # the decoder reads anew
            for layer in held.cross_attention_cache.layers:
                if layer.steps is not None:
                    layer.steps.take_back(layer.steps.taken_eagerly)
            if "num_beams" in way:
                held.batch_repeat_interleave(3)
            mask = {name: one for name, one in inputs.items() if name == "attention_mask"}
            states = model.get_encoder()(**inputs)  # those of the encoder itself
            arguments = {**mask, "encoder_outputs": states, "past_key_values": held, **one}
            expected[name] = answer(model, arguments, **way)
    saved = kvprune.load_cache(tmp_path / "b", model)

    def never(*call):
        raise AssertionError("the encoder ran")

    handle = model.get_encoder().register_forward_hook(never)
    try:
        with kvprune.compress(model, saved) as later:
            for name, way in list(WAYS.items()) * 2:
                found = answer(model, saved.inputs(**way))
                assert all(map(torch.equal, found, expected[name])), name
    finally:
        handle.remove()
    assert later.selections == run.selections
    assert saved.tokens == 0


@pytest.mark.parametrize("family", ["BART", "Whisper"])
@pytest.mark.parametrize("spec", ["full", "divprune:keep_ratio=0.4"])
def test_who_decides_before_the_decoder_reads_answers_any_prompt_as_anew(tmp_path, family, spec):
    model, inputs = model_of(family), inputs_of(family)
    with kvprune.compress(model, spec) as run:
        cache = model(**inputs, decoder_input_ids=torch.full((3, 2), 7)).past_key_values
        run.save(cache, tmp_path / "b", inputs)
    saved = kvprune.load_cache(tmp_path / "b", model)
    prompt = {"decoder_input_ids": questions(3)}
    one = {"force_unique_generate_call": True} if family == "Whisper" else {}
    with kvprune.compress(model, spec):
        expected = answer(model, {**inputs, **prompt, **one})
    with kvprune.compress(model, saved):
        found = answer(model, saved.inputs(prompt["decoder_input_ids"]))
    assert torch.equal(found[0], expected[0])
    assert (found[1] - expected[1]).abs().max() < 1e-9


def test_many_questions_about_one_picture_share_what_is_held_of_it(tmp_path):
    model, _, _, _, saved = saved_mllama(tmp_path / "a", "adakv:keep_ratio=0.3", ["tt4ttt"])
    ids = questions(3)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0  # a shorter question, padded on the left
    arguments = saved.inputs({"input_ids": ids, "attention_mask": mask}, num_beams=2)
    layers = arguments["past_key_values"].layers
    assert [layers[index].copies for index in saved.selections] == [6, 6, 6]
    for index in saved.selections:
        assert layers[index].keys.data_ptr() == saved.copy().layers[index].keys.data_ptr()
    with kvprune.compress(model, saved):
        together, _ = answer(model, arguments)
        for row, (question, own) in enumerate(zip(ids, mask, strict=True)):
            alone, _ = answer(model, saved.inputs(question[None, own.bool()], num_beams=2))
            assert together[row, -3:].tolist() == alone[0, -3:].tolist()


@pytest.mark.parametrize("change", ["reset", "crop", "reorder", "select"])
def test_no_operation_on_a_copy_reaches_the_saved_cache(tmp_path, change):
    _, _, _, _, saved = saved_mllama(tmp_path / "a", "quest")
    before = copy.deepcopy(saved.copy())
    cache = saved.copy()
    {
        "reset": cache.reset,
        "crop": lambda: cache.crop(-2),
        "reorder": lambda: cache.reorder_cache(torch.tensor([2, 0, 1])),
        "select": lambda: cache.batch_select_indices(torch.tensor([1])),
    }[change]()
    for old, now in zip(before.layers, saved.copy().layers, strict=True):
        assert torch.equal(old.keys, now.keys)
        assert torch.equal(old.values, now.values)


def test_a_step_policy_counts_what_questions_to_a_loaded_cache_read(tmp_path):
    model, _, _, _, saved = saved_mllama(tmp_path / "a", "quest:page=2,keep_ratio=0.5")
    with kvprune.compress(model, saved) as run:
        answer(model, saved.inputs(questions(3)))
        answer(model, saved.inputs(questions(3)))
    assert 0 < run.report.read_fraction < 1
    assert {step.steps for step in run.report.steps} == {
        12
    }  # twice 4 tokens of a question and 2 of an answer


def test_another_picture_may_follow_in_the_same_block(tmp_path):
    """The policy of the file decides about it, and the report goes on."""
    model, inputs, _, _, saved = saved_mllama(tmp_path / "a", "random:keep_ratio=0.3")
    with kvprune.compress(model, "random:keep_ratio=0.3", seed=5) as run:
        expected = answer(model, inputs)
    with kvprune.compress(model, saved) as later:
        answer(model, saved.inputs(questions(3)))
        assert all(map(torch.equal, answer(model, inputs), expected))
    assert later.selections == run.selections
    assert (later.report.prefills, later.report.kept_fraction) == (1, run.report.kept_fraction)


def test_a_policy_with_a_guide_needs_none_for_questions(tmp_path):
    model, inputs, _, _, saved = saved_mllama(tmp_path / "a", "guided:keep_ratio=0.3")
    with kvprune.compress(model, saved):
        answer(model, saved.inputs(questions(3)))
        with pytest.raises(kvprune.errors.GuideError, match="no guide was given"):
            answer(model, inputs)


def test_rereading_is_remembered(tmp_path):
    model, inputs, run, cache, saved = saved_mllama(tmp_path / "a", "keydiff:keep_ratio=0.3", reread=True)
    with kvprune.compress(model, run.policy, reread=True):
        expected = answer(model, by_hand(inputs, cache, questions(3)))
    with kvprune.compress(model, saved) as later:
        assert all(map(torch.equal, answer(model, saved.inputs(questions(3))), expected))
    assert later.reread


def test_the_header_says_what_was_compressed(tmp_path):
    _, inputs, run, _, saved = saved_mllama(tmp_path / "a")
    header = saved.header
    assert header["policy"]["name"] == "keydiff"
    assert header["seed"] == saved.seed == 5
    assert header["model"]["class"] == "MllamaForConditionalGeneration"
    assert header["kvprune"] == kvprune.__version__
    assert sorted(header["inputs"]) == sorted(inputs)
    assert sorted(header["selections"]) == ["1", "3", "5"]
    assert (saved.rows, saved.tokens) == (3, inputs["input_ids"].shape[1])
    assert (tmp_path / "a").stat().st_size < 2 * run.report.bytes_full + 60_000
    assert "keydiff" in repr(saved)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]  # nothing is left of writing


def test_outside_the_block_a_loaded_cache_cannot_be_read(tmp_path):
    model, _, _, _, saved = saved_mllama(tmp_path / "a")
    with pytest.raises(UnsupportedCacheError, match="outside the block no mask is cut"):
        answer(model, saved.inputs(questions(3)))


def test_the_page_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "saved-caches.md").read_text("utf-8")
    code = "".join(re.findall(r"<!-- test: picture -->\n```python\n(.*?)```", page, re.DOTALL))
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(compile(code, "saved-caches.md", "exec"), space)
    assert "read from b1 to d1. heart triangle circle" in capsys.readouterr().out
    assert space["saved"].bytes_held * 4 == space["saved"].bytes_full
    assert len(space["out"]) == 2


ELSEWHERE = """
import json, sys, torch, kvprune
from kvprune.testing import tiny_mllama
model = tiny_mllama(1, attn_implementation="sdpa", cross_layers=(1, 3, 5))
saved, ids = kvprune.load_cache(sys.argv[1], model), torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad(), kvprune.compress(model, saved) as run:
    out = model.generate(**saved.inputs(ids, max_new_tokens=3, do_sample=False))
print(json.dumps([out.tolist(), run.report.bytes_held]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["adakv:keep_ratio=0.3", "zipvl"])
def test_another_process_answers_the_same(tmp_path, spec):
    model, inputs, run, cache, _ = saved_mllama(tmp_path / "a", spec)
    with kvprune.compress(model, spec):
        expected, _ = answer(model, by_hand(inputs, cache, questions(3)))
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "a"), json.dumps(questions(3).tolist())]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    assert json.loads(found) == [expected.tolist(), run.report.bytes_held]
