"""Guides: what they add up, who may guide whom, what they cost, and that they leave no trace."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace

import pytest
import torch
from families import rows_so_far
from generation import bart, difference_to_oracle, generate, mllama, whisper
from guidance import Watched, alone, live_rows_of, probe, slow_sum, small, stock_importance
from hypothesis import given
from hypothesis import strategies as st

import kvprune
from kvprune.adapters.attachment import compressing
from kvprune.adapters.base import ModelAdapter
from kvprune.adapters.mllama import MllamaAdapter
from kvprune.engine.guidance import Guidance, GuideReceipt, Prompt, to_rows
from kvprune.errors import GuideError, NestedCompressionError, PolicyOptionError, UnsupportedModelError
from kvprune.session.compression import Compression
from kvprune.session.guide import BoundGuide
from kvprune.testing import mllama_inputs

LAYOUTS = (["4ttt"], ["tt4ttt", "t1tt", "tt2tttt"], ["tt4tt1tt", "t2tt", "14ttt"])


def guided_by(model, inputs, guide=None, **options):
    """Run one forward call under a policy that asks for guidance; return the guidance and the report."""
    views = []
    with kvprune.compress(model, probe(views), guide=guide) as run, torch.no_grad():
        model(**inputs, use_cache=True)
    return views[0].guidance, run.report


# What is added up


@pytest.mark.parametrize("layouts", LAYOUTS)
def test_guidance_is_the_attention_of_the_stock_guide_over_all_layers_heads_and_rows(layouts):
    inputs, guide = mllama_inputs(layouts), small("eager")
    found, report = guided_by(mllama(), inputs, guide)
    torch.testing.assert_close(found.double(), stock_importance(guide, inputs), rtol=1e-4, atol=1e-5)
    assert (report.guide.model, report.guide.is_target) == ("MllamaForConditionalGeneration", False)
    assert report.guide.forward_calls == 1


@pytest.mark.parametrize("layouts", LAYOUTS)
def test_a_model_that_guides_itself_adds_up_its_own_attention(layouts):
    inputs, model = mllama_inputs(layouts), mllama(torch.float32, "eager")
    found, report = guided_by(model, inputs)
    torch.testing.assert_close(found.double(), stock_importance(model, inputs), rtol=1e-4, atol=1e-5)
    assert report.guide.is_target
    # The same model as a guide of its own is no other guide.
    torch.testing.assert_close(guided_by(model, inputs, model)[0], found, rtol=0, atol=0)
    torch.testing.assert_close(guided_by(model, inputs, copy.deepcopy(model))[0], found)


@pytest.mark.parametrize("row_mean", [False, True])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("ends_early", [False, True])
def test_rows_of_the_answer_count_as_the_guide_ran_them(row_mean, own, ends_early):
    """Prefill and decoding of a stock guide, watched call by call: nothing is teacher-forced here."""
    inputs = mllama_inputs(["tt4ttt", "t1tt", "tt2tttt"])
    guide, steps = small("eager"), 5
    start = inputs["input_ids"].shape[1]
    if ends_early:
        answer = guide.generate(**inputs, max_new_tokens=steps, do_sample=False)[:, start:]
        guide.generation_config.eos_token_id = int(answer[0, 2])
    with Watched(guide) as watched:
        answer = guide.generate(**inputs, max_new_tokens=steps, do_sample=False)
    answer = answer[:, start:].tolist()
    end = guide.generation_config.eos_token_id
    lengths = [row.index(end) + 1 if end in row else len(row) for row in answer]
    assert min(lengths) < steps or not ends_early
    rows = live_rows_of(inputs)
    of_prompt = torch.tensor(slow_sum(watched.calls[0], rows)).double()
    of_answer = torch.zeros_like(of_prompt)
    for step, call in enumerate(watched.calls[1:], start=1):
        of_answer += torch.tensor(slow_sum(call, [[0] if step < length else [] for length in lengths]))
    expected = of_prompt + of_answer
    if row_mean:
        expected = of_prompt / torch.tensor([[len(one)] for one in rows])
        expected += of_answer / torch.tensor([[max(1, length - 1)] for length in lengths])
    options = kvprune.Guide(None if own else guide, max_new_tokens=steps, row_mean=row_mean)
    found, report = guided_by(guide if own else mllama(), inputs, options)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    assert report.guide.forward_calls == len(answer[0]) + 1
    read = int(inputs["attention_mask"].sum()) + sum(length - 1 for length in lengths)
    assert report.guide.tokens == 2 * read


@pytest.mark.parametrize("max_new_tokens", [0, 3])
def test_attention_is_conserved(max_new_tokens):
    """Each row gives one to each head of each layer; and the sum over rows is additive."""
    inputs, guide = mllama_inputs(["tt4ttt", "14tt"]), small()
    found, _ = guided_by(mllama(), inputs, kvprune.Guide(guide, max_new_tokens=max_new_tokens))
    rows = torch.tensor([len(one) for one in live_rows_of(inputs)]) + max(0, max_new_tokens - 1)
    torch.testing.assert_close(found.sum(-1), 2.0 * 4 * rows, rtol=1e-5, atol=0)
    more, _ = guided_by(mllama(), inputs, kvprune.Guide(guide, max_new_tokens=max_new_tokens, row_mean=True))
    parts = 1 + (max_new_tokens > 1)
    torch.testing.assert_close(more.sum(-1), torch.full((2,), 2.0 * 4 * parts), rtol=1e-5, atol=0)


@pytest.mark.parametrize("layouts", LAYOUTS)
def test_a_sample_is_guided_alone_as_in_a_batch(layouts):
    inputs = mllama_inputs(layouts)
    options = kvprune.Guide(small(), max_new_tokens=3)
    together, _ = guided_by(mllama(), inputs, options)
    for sample in range(len(layouts)):
        (found,), _ = guided_by(mllama(), alone(inputs, sample), options)
        torch.testing.assert_close(found, together[sample, : len(found)])
        assert not together[sample, len(found) :].any()


def test_layers_are_shown_what_belongs_to_the_columns_that_they_received():
    views, inputs = [], mllama_inputs(["4ttt", "2tt"])
    policy = probe(views, layers=True)

    def choose(view):
        views.append(view)
        kept = view.visible_in_prefill.clone()
        kept[:, ::2] = False
        return kvprune.Decision(onward=kvprune.Selection.from_mask(kept[:, None]))

    object.__setattr__(policy, "choose", choose)
    with kvprune.compress(mllama(), policy) as run, torch.no_grad():
        mllama()(**inputs, use_cache=True)
    whole, *layers = views
    assert len(layers) == 3
    kept = run.prefill_selections[1]
    for sample, (indices, valid) in enumerate(zip(kept.indices[:, 0], kept.valid[:, 0], strict=True)):
        for place, (column, there) in enumerate(zip(indices.tolist(), valid.tolist(), strict=True)):
            if there:
                assert all(view.guidance[sample, place] == whole.guidance[sample, column] for view in layers)


@pytest.mark.parametrize("family", [bart, whisper])
def test_encoder_decoder_models_guide_themselves_by_the_rows_of_their_prompt(family):
    model = family(torch.float32, "eager")
    prompt = torch.tensor([[2, 7, 9], [2, 8, 5]])
    if family is bart:
        mask = (torch.arange(7) < torch.tensor([[7], [4]])).long()
        inputs = {"input_ids": torch.randint(4, 60, (2, 7)) * mask, "attention_mask": mask}
    else:
        inputs = {"input_features": torch.randn(2, 8, 100)}
    inputs["decoder_input_ids"] = prompt
    with Watched(model) as watched, torch.no_grad():
        model(**inputs)
    found, report = guided_by(model, inputs)
    expected = torch.tensor(slow_sum(watched.calls[0], [[0, 1, 2]] * 2)).double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert (report.guide.is_target, report.guide.forward_calls, report.guide.tokens) == (True, 1, 6)
    del inputs["decoder_input_ids"]
    assert difference_to_oracle(model, inputs, "guided") < 1e-5


# Where the guide runs: calls of other kinds


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_beams_and_return_sequences_are_guided_once(own, options):
    inputs = mllama_inputs(["tt4ttt", "t1tt"])
    guide = None if own else small()
    policy, views = kvprune.get_policy("guided:keep_ratio=0.3"), []
    expected, _ = guided_by(mllama(), inputs, guide)
    with kvprune.compress(mllama(), probe(views), guide=guide) as run:
        generate(mllama(), inputs, **options)
    assert views[0].guidance.shape == (2, 20)
    torch.testing.assert_close(views[0].guidance, expected)
    assert run.report.guide.tokens == int(inputs["attention_mask"].sum())
    with kvprune.compress(mllama(), policy, guide=guide) as run:
        generate(mllama(), inputs, **options)
    assert run.selections[1].indices.shape[0] == 2 * next(n for n in options.values() if n > 1)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
@pytest.mark.parametrize("max_new_tokens", [0, 3])
def test_guidance_does_not_depend_on_the_targets_cache(cache, max_new_tokens):
    inputs = mllama_inputs(["tt4ttt", "t1tt", "tt2tttt"])
    for guide in (kvprune.Guide(small(), max_new_tokens=max_new_tokens), kvprune.Guide(max_new_tokens=3)):
        expected, _ = guided_by(mllama(), inputs, guide)
        views = []
        with kvprune.compress(mllama(), probe(views), guide=guide):
            generate(mllama(), inputs, steps=2, **cache)
        torch.testing.assert_close(views[0].guidance, expected)


@pytest.mark.parametrize("own", [True, False])
def test_draft_tokens_are_not_read_by_the_guide(own):
    inputs = mllama_inputs(["tt4tttttt"])
    inputs["input_ids"][0, 3:] = torch.tensor([5, 6, 7, 5, 6, 7])  # so that something can be looked up
    guide = None if own else small()
    expected, _ = guided_by(mllama(), inputs, guide)
    views = []
    with kvprune.compress(mllama(), probe(views), guide=guide) as run:
        mllama().generate(**inputs, max_new_tokens=4, do_sample=False, prompt_lookup_num_tokens=3)
    torch.testing.assert_close(views[0].guidance, expected)
    assert run.report.guide.tokens == 9


def second_turn(first="tt4ttt", both="tt4ttt1ttt"):
    """A call with the first image, and one with the second."""
    whole, head = mllama_inputs([both]), len(first)
    images = slice(0, 1)
    one = {"input_ids": whole["input_ids"][:, :head], "attention_mask": whole["attention_mask"][:, :head]}
    one["cross_attention_mask"] = whole["cross_attention_mask"][:, :head, images]
    two = {"input_ids": whole["input_ids"][:, head:], "attention_mask": whole["attention_mask"]}
    two["cross_attention_mask"] = whole["cross_attention_mask"][:, head:]
    for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        one[name], two[name] = whole[name][:, images], whole[name][:, 1:]
    return one, two


def test_an_image_of_a_later_turn_is_ranked_by_a_model_that_guides_itself():
    """The guide reads a copy of the conversation so far; what it ranks are the new columns."""
    model = mllama(torch.float32, "eager")
    one, two = second_turn()
    with torch.no_grad():
        cache = model(**one, use_cache=True).past_key_values
        plain = two | {
            "cross_attention_mask": rows_so_far(two["cross_attention_mask"], cache.get_seq_length())
        }
        with Watched(model) as watched:
            model(**plain, past_key_values=cache, use_cache=True)
    # The new text sees the new image only, so stock's weights over its columns are whole, too.
    sees = two["cross_attention_mask"][0, :, 1].any(-1)
    call = [weights[..., 20:] for weights in watched.calls[0]]
    expected = slow_sum(call, [[row for row, flag in enumerate(sees.tolist()) if flag]])
    views = []
    with kvprune.compress(model, probe(views)) as run, torch.no_grad():
        cache = model(**one, use_cache=True).past_key_values
        model(**two, past_key_values=cache, use_cache=True)
    assert views[1].guidance.shape == (1, 20)
    torch.testing.assert_close(
        views[1].guidance.double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-5
    )
    assert run.report.guide.runs == 2
    assert cache.get_seq_length() == 10  # the copy was read, not the cache itself


def test_another_model_has_not_read_the_turns_before_and_says_so():
    model = mllama()
    one, two = second_turn()
    with kvprune.compress(model, "guided", guide=small()), torch.no_grad():
        cache = model(**one, use_cache=True).past_key_values
        with pytest.raises(GuideError, match="has not read the turns before"):
            model(**two, past_key_values=cache, use_cache=True)


def test_a_guide_does_not_generate_in_a_later_turn():
    model = mllama()
    one, two = second_turn()
    with kvprune.compress(model, "guided", guide=kvprune.Guide(max_new_tokens=2)), torch.no_grad():
        cache = model(**one, use_cache=True).past_key_values
        with pytest.raises(GuideError, match="got a later turn; use max_new_tokens=0"):
            model(**two, past_key_values=cache, use_cache=True)


def test_a_guide_may_have_another_precision():
    inputs = mllama_inputs(["tt4ttt", "t1tt"], dtype=torch.float64)
    found, _ = guided_by(mllama(torch.float64), inputs, small())
    expected, _ = guided_by(mllama(torch.float64), inputs, small(dtype=torch.float64))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_embeddings_and_encoder_states_of_the_target_are_no_prompt_for_another_model():
    model, inputs = mllama(), mllama_inputs(["tt4ttt"])
    embedded = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    del embedded["input_ids"]
    expected, _ = guided_by(model, inputs)
    torch.testing.assert_close(guided_by(model, embedded)[0], expected)
    with pytest.raises(GuideError, match="inputs_embeds, which mean nothing to another model"):
        guided_by(model, embedded, small())
    with pytest.raises(GuideError, match="got inputs_embeds"):
        guided_by(model, embedded, kvprune.Guide(max_new_tokens=2))
    states = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: states.append(kwargs["cross_attention_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    encoded = {name: inputs[name] for name in ("input_ids", "attention_mask", "cross_attention_mask")}
    encoded["cross_attention_states"] = states[0]
    torch.testing.assert_close(guided_by(model, encoded)[0], expected)
    with pytest.raises(GuideError, match="a guide reads pixel_values"):
        guided_by(model, encoded, small())


# Who may guide whom: refused before anything runs


def test_another_geometry_is_refused_and_both_are_shown():
    other = copy.deepcopy(small())
    other.model.vision_model.image_size = 42
    other.model.vision_model.num_patches = 10
    with pytest.raises(GuideError) as caught:
        kvprune.compress(mllama(), "guided", guide=other)
    assert "guide:  image size 42, patch size 14, tiles per image 4, columns per tile 10" in str(caught.value)
    assert "target: image size 28, patch size 14, tiles per image 4, columns per tile 5" in str(caught.value)


def test_another_vocabulary_is_refused():
    other = copy.deepcopy(small())
    other.config.text_config.vocab_size = 65
    with pytest.raises(GuideError, match="vocabulary 65"):
        kvprune.compress(mllama(), "guided", guide=other)


def test_a_guide_that_nobody_asks_is_refused():
    with pytest.raises(GuideError, match=r"trim:.* does not use a guide, but got one \(MllamaFor"):
        kvprune.compress(mllama(), "trim", guide=small())
    with pytest.raises(GuideError, match="does not use a guide"):
        kvprune.compress(mllama(), "full", guide=kvprune.Guide())


def test_models_that_cannot_guide_are_refused():
    with pytest.raises(UnsupportedModelError, match="Linear"):
        kvprune.compress(mllama(), "guided", guide=torch.nn.Linear(2, 2))
    with pytest.raises(GuideError, match=r"BartForConditionalGeneration \(BART\) takes no part"):
        kvprune.compress(mllama(), "guided", guide=bart())
    with pytest.raises(GuideError, match=r"BartForConditionalGeneration \(BART\) takes no part"):
        kvprune.compress(bart(), "guided", guide=small())
    with pytest.raises(GuideError, match=r"max_new_tokens=4: the adapter for BART lacks answer\(\)"):
        kvprune.compress(bart(), "guided", guide=kvprune.Guide(max_new_tokens=4))

    class Old(MllamaAdapter):
        replay = ModelAdapter.replay

    with pytest.raises(GuideError, match=r"lacks replay\(\)"):
        Compression(Old(mllama()), kvprune.get_policy("guided"), 0)


@pytest.mark.parametrize("limit", [-1, 1.5, True, "3"])
def test_bad_options_of_a_guide_are_refused(limit):
    with pytest.raises(GuideError, match="max_new_tokens of a guide"):
        kvprune.Guide(max_new_tokens=limit)
    with pytest.raises(GuideError, match="row_mean"):
        kvprune.Guide(row_mean=1)
    with pytest.raises(GuideError, match="a guide is a model"):
        kvprune.Guide("llama")


def test_a_guide_that_is_compressed_itself_is_refused():
    guide, inputs = small(), mllama_inputs(["4tt"])
    with (
        pytest.raises(NestedCompressionError, match=r"the guide .* is being compressed itself \(Llama-3.2"),
        kvprune.compress(guide, "trim"),
        kvprune.compress(mllama(), "guided", guide=guide),
    ):
        generate(mllama(), inputs)
    with pytest.raises(GuideError, match="MllamaModel is a part of the target"):
        kvprune.compress(mllama(), "guided", guide=mllama().model)


def test_a_policy_that_reads_guidance_must_declare_it():
    @dataclass(frozen=True, kw_only=True)
    class Undeclared(kvprune.FeatureScoringPolicy):
        name = "undeclared"

        def score(self, view):
            return view.guidance[:, None]

    with (
        pytest.raises(PolicyOptionError, match=r"reads view\.guidance"),
        kvprune.compress(mllama(), Undeclared()),
    ):
        generate(mllama(), mllama_inputs(["4tt"]))


@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_rows_of_a_given_guidance_fit_or_are_refused(have, rows, copies, columns):
    scores = torch.arange(have)[:, None].expand(-1, columns).float()
    guidance = Guidance(scores=scores, rows=torch.ones(have, dtype=torch.int64))
    with pytest.raises(GuideError, match=f"ranked {columns} encoder tokens, but {columns + 1} arrive"):
        to_rows(guidance, rows, copies, columns + 1)
    if have % rows or copies % (have // rows):
        with pytest.raises(GuideError, match=f"{have} samples, but the target's batch has {rows * copies}"):
            to_rows(guidance, rows, copies, columns)
    else:
        of_row = [row * have // rows for row in range(rows)]
        assert to_rows(guidance, rows, copies, columns).scores[:, 0].tolist() == of_row


def test_guidance_that_was_given_serves_beams_and_samples_that_are_alike():
    guide, inputs = small(), mllama_inputs(["tt4ttt", "t1tt"])
    twice = {name: tensor[[0, 0, 1, 1]] for name, tensor in inputs.items()}
    bound = BoundGuide(kvprune.Guide(guide), MllamaAdapter(mllama()))
    expected, _ = guided_by(mllama(), inputs, guide)
    for batch, options in ((inputs, {"num_beams": 2}), (twice, {}), (twice, {"num_beams": 2})):
        views, given_guidance = [], bound.ask(Prompt(batch))
        assert given_guidance.consistency is given_guidance.answer is None
        with kvprune.compress(mllama(), probe(views), guide=given_guidance) as run:
            generate(mllama(), batch, **options)
        rows = expected if batch is inputs else expected[[0, 0, 1, 1]]  # equal samples are held apart
        torch.testing.assert_close(views[0].guidance, rows)
        assert run.report.guide == given_guidance.receipt
    with (
        pytest.raises(GuideError, match="ranked the tokens of 4 samples, but the target's batch has 2"),
        kvprune.compress(mllama(), "guided", guide=given_guidance),
    ):
        generate(mllama(), inputs)


# Nothing is left behind, and everything is counted


def hooks_of(model):
    return {
        name: (len(module._forward_hooks), len(module._forward_pre_hooks), sorted(module.__dict__))
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("own", [True, False])
def test_models_are_as_before_also_after_the_guide_failed(own):
    model, guide, inputs = copy.deepcopy(mllama()), small(), mllama_inputs(["4tt"])
    broken = model if own else guide
    before = hooks_of(model), hooks_of(guide)
    calls = []

    def fail(*call):
        calls.append(1)
        raise ValueError("no such token")

    layer = broken.model.language_model.layers[2]
    handle = layer.register_forward_hook(fail)
    with (
        pytest.raises(GuideError, match=r"raised ValueError over the target's prompt: no such token"),
        kvprune.compress(model, "guided", guide=None if own else guide),
    ):
        generate(model, inputs)
    handle.remove()
    assert calls == [1]
    assert (hooks_of(model), hooks_of(guide)) == before
    assert compressing(model) is None
    with kvprune.compress(model, "guided", guide=None if own else guide) as run:
        assert compressing(model) is not None
        generate(model, inputs)
    assert run.report.prefills == 1
    assert (hooks_of(model), hooks_of(guide)) == before


@pytest.mark.parametrize("own", [True, False])
def test_generation_under_guidance_that_keeps_all_is_bit_identical(own):
    inputs = mllama_inputs(["4ttt", "4tt"])
    guide = kvprune.Guide(None if own else small(), max_new_tokens=3)
    expected = generate(mllama(), inputs)
    with kvprune.compress(mllama(), "guided:keep_ratio=1", guide=guide):
        found = generate(mllama(), inputs)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_the_report_names_what_the_guide_cost():
    inputs = mllama_inputs(["tt4ttt", "t1tt"])
    with kvprune.compress(mllama(), "guided", guide=kvprune.Guide(small(), max_new_tokens=3)) as run:
        assert run.report.guide is None
        generate(mllama(), inputs)
        once = run.report.guide
        generate(mllama(), inputs)
    guide = run.report.guide
    assert (once.runs, guide.runs) == (1, 2)
    assert (guide.forward_calls, guide.tokens) == (2 * once.forward_calls, 2 * once.tokens) == (8, 2 * 28)
    assert guide.seconds > once.seconds > 0
    # While it generates, it holds all that stock holds: B, Hkv, S, D, keys and values, float32, layers.
    assert guide.bytes_peak == once.bytes_peak == 2 * 2 * 20 * 8 * 2 * 4 * 2
    data = json.loads(json.dumps(run.report.to_dict()))
    assert GuideReceipt(**data["guide"]) == guide
    assert str(guide) in str(run.report)
    assert "guided by MllamaForConditionalGeneration: 8 forward calls, 56 text tokens" in str(run.report)


def test_over_a_prompt_a_guide_holds_one_layer_at_a_time():
    _, report = guided_by(mllama(), mllama_inputs(["tt4ttt"]), small())
    assert report.guide.bytes_peak == 2 * 20 * 8 * 2 * 4
    assert guided_by(mllama(), mllama_inputs(["tt4ttt"]))[1].guide.bytes_peak == 2 * 20 * 8 * 2 * 4


def test_reports_without_a_guide_say_nothing_of_one():
    with kvprune.compress(mllama(), "trim") as run:
        generate(mllama(), mllama_inputs(["4tt"]))
    assert run.report.to_dict()["guide"] is None
    assert "guide" not in str(run.report)


def test_receipts_add_up():
    one = GuideReceipt(
        model="M", is_target=True, runs=1, forward_calls=2, tokens=3, seconds=4.0, bytes_peak=5
    )
    both = one.plus(replace(one, bytes_peak=9))
    assert both == replace(one, runs=2, forward_calls=4, tokens=6, seconds=8.0, bytes_peak=9)
    assert one.plus(None) is one
    assert "itself" in str(one)
