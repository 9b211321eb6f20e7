"""What cannot be saved, files that are refused, and questions that do not fit."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

import pytest
import torch
from families import inputs_of, model_of
from generation import mllama
from safetensors.torch import save_file
from saved_caches import LAYOUT, questions, saved_mllama
from transformers import DynamicCache

import kvprune
from kvprune.cache.file import read_file, write_file
from kvprune.errors import SavedCacheError, SpecError
from kvprune.testing import mllama_inputs, tiny_mllama

SPEC = "keydiff:keep_ratio=0.3"


@dataclass(frozen=True, kw_only=True)
class SpreadOfKeys(kvprune.ScoringPolicy):
    """Ranks tokens by the spread of their keys; no plugin provides it."""

    name = "spread-of-keys"
    version = 1

    def score(self, view):
        return view.keys.float().std(-1)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "page.safetensors"
    with torch.no_grad():
        saved_mllama(path)
    return path


def read_prompt(model=None, spec=SPEC, **options):
    model, inputs = model or mllama(), mllama_inputs(LAYOUT, dtype=torch.float32)
    with kvprune.compress(model, spec) as run:
        cache = model(**inputs, **options).past_key_values
    return run, cache, inputs


def header_of(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["kvprune_cache"])


# --- saving


def test_what_is_no_cache_of_the_latest_prefill_is_not_saved(tmp_path):
    run, cache, inputs = read_prompt()
    other, stock, _ = read_prompt()
    bare = mllama()(**inputs).past_key_values
    path = tmp_path / "a"
    for wrong, message in [
        (None, r"got None; pass the past_key_values"),
        (bare, r"layer 1 of this cache is a DynamicLayer, which kvprune has not filled"),
        (stock, r"layer 1 of this cache was not filled by the latest prefill"),
        (DynamicCache(), r"layer 1 of this cache is a NoneType"),
        (DynamicCache(offloading=True), r"DynamicCache offloads its layers"),
    ]:
        with pytest.raises(SavedCacheError, match=message):
            run.save(wrong, path, inputs)
    assert not list(tmp_path.iterdir())
    other.save(stock, path, inputs)
    run.save(cache, tmp_path / "b", inputs)


def test_a_path_that_exists_is_kept_unless_it_may_be_overwritten(tmp_path):
    run, cache, inputs = read_prompt()
    path = tmp_path / "a"
    path.write_text("mine")
    with pytest.raises(
        SavedCacheError, match=r"a exists already; choose another path, or pass overwrite=True"
    ):
        run.save(cache, path, inputs)
    assert path.read_text() == "mine"
    run.save(cache, path, inputs, overwrite=True)
    kvprune.load_cache(path, mllama())
    with pytest.raises(SavedCacheError, match=r"missing.*cannot be written"):
        run.save(cache, tmp_path / "missing" / "a", inputs)


def test_inputs_that_the_cache_has_not_read_are_refused(tmp_path):
    run, cache, inputs = read_prompt()
    ids, mask, path = inputs["input_ids"], inputs["attention_mask"], tmp_path / "a"
    length = ids.shape[1]
    for changed, message in [
        ({"input_ids": None}, r"must have the input_ids \[B, T\]"),
        ({"input_ids": ids[:, 1:]}, rf"3 rows of {length} tokens, but input_ids is \[3, {length - 1}\]"),
        ({"input_ids": ids[:1]}, rf"3 rows of {length} tokens, but input_ids is \[1, {length}\]"),
        (
            {"attention_mask": mask[:, 1:]},
            rf"attention_mask must be \[3, {length}\].*got \[3, {length - 1}\]",
        ),
        ({"attention_mask": mask.flip(1)}, r"pad on the left"),
    ]:
        with pytest.raises(SavedCacheError, match=message):
            run.save(cache, path, {**inputs, **changed})


def test_a_cache_that_has_an_answer_needs_all_that_it_has_read(tmp_path):
    model, inputs = mllama(), mllama_inputs(LAYOUT, dtype=torch.float32)
    with kvprune.compress(model, SPEC) as run:
        out = model.generate(
            **inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True
        )
    with pytest.raises(SavedCacheError, match=r"save it before anything is generated"):
        run.save(out.past_key_values, tmp_path / "a", inputs)
    ids = out.sequences[:, :-1]
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids[:, :2])], 1)
    run.save(out.past_key_values, tmp_path / "a", {**inputs, "input_ids": ids, "attention_mask": mask})
    saved = kvprune.load_cache(tmp_path / "a", model)
    with kvprune.compress(model, saved):
        more = model.generate(**saved.inputs(out.sequences[:, -1:], max_new_tokens=2, do_sample=False))
    with kvprune.compress(model, SPEC):
        expected = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert torch.equal(more, expected)


def test_a_static_cache_and_an_interrupted_prefill_are_refused(tmp_path):
    run, cache, inputs = read_prompt()
    cache.layers[0] = DynamicCache(config=mllama().config.get_text_config()).layers[0]
    with pytest.raises(SavedCacheError, match=r"layer 0 of this cache holds nothing: .* interrupted"):
        run.save(cache, tmp_path / "a", inputs)
    model = mllama()
    with kvprune.compress(model, SPEC) as run:
        out = model.generate(
            **inputs, max_new_tokens=2, cache_implementation="static", return_dict_in_generate=True
        )
    with pytest.raises(SavedCacheError, match=r"layer 0 of this cache is a StaticLayer; only dynamic layers"):
        run.save(out.past_key_values, tmp_path / "a", inputs)


def test_decode_steps_without_their_text_are_not_saved(tmp_path):
    model, inputs = model_of("BART", torch.float32), inputs_of("BART", dtype=torch.float32)
    with kvprune.compress(model, "quest") as run:
        out = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
    with pytest.raises(SavedCacheError, match=r"decided in \d decode steps of layer 0"):
        run.save(out.past_key_values, tmp_path / "a", inputs)


# --- loading


def test_a_file_that_was_cut_or_changed_anywhere_is_noticed(tmp_path, file):
    whole, path, model = file.read_bytes(), tmp_path / "changed", mllama()
    draw = random.Random(1)
    for cut in (0, 7, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(
            SavedCacheError, match=r"cannot be read: it is no safetensors file, or was cut off"
        ):
            kvprune.load_cache(path, model)
    places = [draw.randrange(len(whole)) for _ in range(30)] + [draw.randrange(2000) for _ in range(10)]
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << draw.randrange(7)
        path.write_bytes(bytes(changed))
        with pytest.raises(SavedCacheError):
            kvprune.load_cache(path, model)


def test_other_files_are_refused_by_what_they_are(tmp_path, file):
    model, path = mllama(), tmp_path / "other"
    with pytest.raises(SavedCacheError, match=r"there is no such file"):
        kvprune.load_cache(path, model)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(SavedCacheError, match=r"is a safetensors file, but no saved cache"):
        kvprune.load_cache(path, model)
    save_file({"a": torch.ones(1)}, path, metadata={"kvprune_cache": json.dumps({"format": 99})})
    with pytest.raises(SavedCacheError, match=r"has format version 99, and this version of kvprune reads 1"):
        kvprune.load_cache(path, model)
    save_file({"a": torch.ones(1)}, path, metadata={"kvprune_cache": "["})
    with pytest.raises(SavedCacheError, match=r"its header is no JSON"):
        kvprune.load_cache(path, model)
    save_file({"a": torch.ones(1)}, path, metadata={"kvprune_cache": json.dumps(header_of(file))})
    with pytest.raises(SavedCacheError, match=r"it has other tensors than its header says"):
        kvprune.load_cache(path, model)
    write_file(path, {"rows": 1}, {"a": torch.ones(1)}, overwrite=True)
    with pytest.raises(SavedCacheError, match=r"was not written by run.save of this version \(KeyError"):
        kvprune.load_cache(path, model)


def test_other_selections_than_the_header_says_are_noticed(tmp_path, file):
    header, tensors = read_file(file)
    name = next(name for name in sorted(tensors) if name.startswith("selections.kept") and "indices" in name)
    write_file(tmp_path / "a", header, {**tensors, name: tensors[name] + 1}, overwrite=False)
    with pytest.raises(SavedCacheError, match=r"its selections have other digests"):
        kvprune.load_cache(tmp_path / "a", mllama())


def test_another_model_is_refused_by_what_differs(file):
    other = tiny_mllama(2, attn_implementation="sdpa", cross_layers=(1, 3, 5))
    for model, message in [
        (
            model_of("BART", torch.float32),
            r"with a 'MllamaForConditionalGeneration', but this model is a Bart",
        ),
        (mllama(cross_layers=(1, 4)), r"cross_attention_layers \[1, 3, 5\] there, \[1, 4\] here"),
        (
            mllama(torch.float64),
            r"a model in 'float32', but this one is in float64; load the model with dtype=",
        ),
        (other, r"other weights of MllamaForConditionalGeneration"),
    ]:
        with pytest.raises(SavedCacheError, match=message):
            kvprune.load_cache(file, model)
    kvprune.load_cache(file, mllama(attention="eager"))


def test_one_changed_weight_is_noticed_where_all_changed(file):
    model = tiny_mllama(1, attn_implementation="sdpa", cross_layers=(1, 3, 5))
    kvprune.load_cache(file, model)
    model.model.language_model.layers[0].self_attn.q_proj.weight.mul_(1.001)
    with pytest.raises(SavedCacheError, match=r"other weights of MllamaForConditionalGeneration"):
        kvprune.load_cache(file, model)


def test_a_policy_of_another_version_or_one_that_is_not_installed(tmp_path, file):
    header, tensors = read_file(file)
    policy = {**header["policy"], "version": 99}
    write_file(tmp_path / "a", {**header, "policy": policy}, tensors, overwrite=False)
    with pytest.raises(SpecError, match="version 99"):
        kvprune.load_cache(tmp_path / "a", mllama())
    run, cache, inputs = read_prompt(spec=SpreadOfKeys(keep_ratio=0.3))
    run.save(cache, tmp_path / "b", inputs)
    with pytest.raises(kvprune.errors.UnknownPolicyError, match="spread"):
        kvprune.load_cache(tmp_path / "b", mllama())
    saved = kvprune.load_cache(tmp_path / "b", mllama(), policy=run.policy)
    with kvprune.compress(mllama(), saved):
        mllama().generate(**saved.inputs(questions(3), max_new_tokens=2))
    with pytest.raises(SavedCacheError, match=r"was pruned by .*spread.*, but policy is full"):
        kvprune.load_cache(tmp_path / "b", mllama(), policy=kvprune.get_policy("full"))


# --- asking


def test_questions_that_do_not_fit_are_refused(file):
    saved = kvprune.load_cache(file, mllama())
    for question, message in [
        (None, r"a question is the tokens after the prompt .*got None"),
        (torch.ones(4), r"a question is the tokens"),
        (questions(3)[:, :0], r"a question is the tokens"),
        (questions(2), r"holds 3 rows, but the question has 2; ask one question for each row"),
        ({"attention_mask": questions(3)}, r"a question is the tokens"),
    ]:
        with pytest.raises(SavedCacheError, match=message):
            saved.inputs(question)


def test_another_model_seed_or_place_than_it_was_loaded_for_is_refused(file):
    model = tiny_mllama(1, attn_implementation="sdpa", cross_layers=(1, 3, 5))
    saved = kvprune.load_cache(file, model)
    with pytest.raises(
        SavedCacheError, match=r"was loaded for another MllamaForConditionalGeneration object"
    ):
        kvprune.compress(mllama(), saved)
    with pytest.raises(SavedCacheError, match=r"was pruned with seed 5, got seed=7"):
        kvprune.compress(model, saved, seed=7)
    kvprune.compress(model, saved, seed=5)
    model.double()
    with pytest.raises(SavedCacheError, match=r"in torch.float64 now, but was on cpu in torch.float32"):
        saved.inputs(questions(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": (0.0, 0.4), "logprob_threshold": -1.0}, r"temperature=\(0.0, 0.4\)"),
        ({"no_speech_threshold": 0.6, "logprob_threshold": -1.0}, r"no_speech_threshold=0.6"),
        ({"num_return_sequences": 2, "do_sample": True}, r"num_return_sequences=2; ask once"),
    ],
)
def test_whisper_reads_a_saved_window_once(tmp_path, monkeypatch, options, message):
    model, inputs = model_of("Whisper", torch.float32), inputs_of("Whisper", dtype=torch.float32)
    monkeypatch.setattr(model.generation_config, "no_timestamps_token_id", 5, raising=False)
    with kvprune.compress(model, SPEC) as run:
        start = torch.full((3, 1), model.config.decoder_start_token_id)
        run.save(model(**inputs, decoder_input_ids=start).past_key_values, tmp_path / "a", inputs)
    saved = kvprune.load_cache(tmp_path / "a", model)
    with kvprune.compress(model, saved), pytest.raises(SavedCacheError, match=message):
        model.generate(**saved.inputs(max_new_tokens=3, **options))


def test_whoever_reads_the_encoders_output_is_told_that_it_is_absent(tmp_path):
    model, inputs = model_of("BART", torch.float32), inputs_of("BART", dtype=torch.float32)
    with kvprune.compress(model, SPEC) as run:
        run.save(model(**inputs).past_key_values, tmp_path / "a", inputs)
    saved = kvprune.load_cache(tmp_path / "a", model)
    arguments = saved.inputs(max_new_tokens=2)
    del arguments["past_key_values"]
    with (
        kvprune.compress(model, saved),
        pytest.raises(SavedCacheError, match=r"not in a saved cache, but .* reads"),
    ):
        model.generate(**arguments)


def test_a_path_is_no_cache_and_no_policy(file):
    for path in (file, str(file)):
        with pytest.raises(SavedCacheError, match=r"is the path of a file; load .*kvprune.load_cache\(path"):
            kvprune.compress(mllama(), path)


def test_a_spec_is_no_policy_of_a_cache(file):
    with pytest.raises(
        SavedCacheError, match=rf"policy object that pruned .*, got 'trim'; leave it out for {SPEC}"
    ):
        kvprune.load_cache(file, mllama(), policy="trim")


def test_questions_are_whole_numbers(file):
    with pytest.raises(SavedCacheError, match="a question is the tokens after the prompt"):
        kvprune.load_cache(file, mllama()).inputs(questions(3).float())
