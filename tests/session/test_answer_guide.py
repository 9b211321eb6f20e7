"""Guidance that is made from a known answer: what it adds up, who may use it, and what it costs."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from generation import bart, generate, mllama, whisper
from guidance import Watched, alone, small
from hypothesis import given, settings
from hypothesis import strategies as st

import kvprune
from kvprune.adapters.attachment import compressing
from kvprune.adapters.encoder_decoder import EncoderDecoderAdapter
from kvprune.adapters.families.whisper import WhisperAdapter
from kvprune.engine.guidance import Prompt
from kvprune.errors import GuideError, NestedCompressionError
from kvprune.session.answer_guide import AnswerGuide, answer_attention
from kvprune.session.registry import find_adapter
from kvprune.testing import mllama_inputs

DOUBLE = torch.float64
LAYOUTS = (["4ttt"], ["tt4ttt", "t1tt", "tt2tttt"], ["tt4tt1tt", "t2tt", "14ttt"])


def answers(lengths, seed=0):
    """Random answers of these lengths: tokens, with something arbitrary as padding, and what is written."""
    random = torch.Generator().manual_seed(seed)
    answer = torch.randint(3, 59, (len(lengths), max(lengths)), generator=random)
    written = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return answer, written


def bart_inputs():
    mask = (torch.arange(7) < torch.tensor([[7], [4], [6]])).long()
    return {"input_ids": torch.randint(4, 60, (3, 7), generator=seeded()) * mask, "attention_mask": mask}


def whisper_inputs():
    return {"input_features": torch.randn(3, 8, 100, generator=seeded(), dtype=DOUBLE)}


def seeded():
    return torch.Generator().manual_seed(0)


def mean_of_rows(layers, rows):
    """Of one sample: the sum over layers of the mean over heads and rows, ``[S]``, in plain loops."""
    total = torch.zeros(layers[0].shape[-1], dtype=DOUBLE)
    for weights in layers:  # [1, Hq, T, S]
        for head in weights[0]:
            for row in rows:
                total += head[row].double() / (len(weights[0]) * len(rows))
    return total


# What is added up


@pytest.mark.parametrize("layouts", LAYOUTS)
def test_scores_are_the_attention_of_the_stock_mllama_by_rows_that_predict_the_answer(layouts):
    """Each sample alone in the untouched model: neither other samples nor any padding change its scores."""
    inputs = mllama_inputs(layouts, dtype=DOUBLE)
    lengths = [4, 1, 3][: len(layouts)]
    answer, written = answers(lengths)
    model = mllama(DOUBLE)
    found = answer_attention(model, inputs, answer, written)
    stock = mllama(DOUBLE, "eager")
    for sample, length in enumerate(lengths):
        one = alone(inputs, sample)
        prompt = one["input_ids"].shape[1]
        more = length - 1
        one["input_ids"] = torch.cat([one["input_ids"], answer[sample : sample + 1, :more]], dim=1)
        one["attention_mask"] = torch.ones_like(one["input_ids"])
        last = one["cross_attention_mask"][:, -1:].expand(-1, more, -1, -1)
        one["cross_attention_mask"] = torch.cat([one["cross_attention_mask"], last], dim=1)
        with Watched(stock) as watched, torch.no_grad():
            stock(**one)
        expected = mean_of_rows(watched.calls[0], range(prompt - 1, prompt + more))
        scores = found.scores[sample]
        torch.testing.assert_close(scores[: len(expected)].double(), expected, rtol=0, atol=1e-6)
        assert not scores[len(expected) :].any()
    assert found.rows.tolist() == lengths
    torch.testing.assert_close(found.scores.sum(-1), torch.full((len(layouts),), 3.0, dtype=DOUBLE))


@pytest.mark.parametrize(("family", "make"), [(bart, bart_inputs), (whisper, whisper_inputs)])
def test_scores_are_the_attention_of_stock_encoder_decoder_models(family, make):
    inputs, lengths = make(), [2, 5, 1]
    answer, written = answers(lengths)
    found = answer_attention(family(DOUBLE), inputs, answer, written)
    stock = family(DOUBLE, "eager")
    start = stock.generation_config.decoder_start_token_id
    start = stock.config.decoder_start_token_id if start is None else start
    for sample, length in enumerate(lengths):
        one = {name: tensor[sample : sample + 1] for name, tensor in inputs.items()}
        if "attention_mask" in one:
            real = one["attention_mask"][0].bool()
            one = {name: tensor[:, real] for name, tensor in one.items()}
        ids = torch.cat([torch.tensor([[start]]), answer[sample : sample + 1, : length - 1]], dim=1)
        with torch.no_grad():
            weights = stock(**one, decoder_input_ids=ids, output_attentions=True).cross_attentions
        expected = mean_of_rows(weights, range(length))
        scores = found.scores[sample]
        torch.testing.assert_close(scores[: len(expected)].double(), expected, rtol=0, atol=1e-6)
        assert not scores[len(expected) :].any()
    assert found.rows.tolist() == lengths


def test_prompts_of_several_tokens_and_with_a_mask_are_read_as_generate_reads_them():
    """The decoder's prompt is padded on the left here: positions of Whisper skip the padding."""
    model, inputs = whisper(DOUBLE), whisper_inputs()
    ids = torch.tensor([[2, 7, 9], [0, 8, 5], [2, 3, 4]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 1]])
    answer, written = answers([2, 3, 2])
    given = {**inputs, "decoder_input_ids": ids, "decoder_attention_mask": mask}
    found = answer_attention(model, given, answer, written)
    one = {"input_features": inputs["input_features"][1:2], "decoder_input_ids": ids[1:2, 1:]}
    wanted = answer_attention(model, one, answer[1:2], written[1:2])
    torch.testing.assert_close(found.scores[1:2], wanted.scores, rtol=0, atol=1e-9)
    assert found.rows.tolist() == [2, 3, 2]


@pytest.mark.parametrize(
    ("family", "inputs"),
    [
        (mllama, mllama_inputs(["tt4ttt", "t1tt"], dtype=DOUBLE)),
        (bart, bart_inputs()),
        (whisper, whisper_inputs()),
    ],
)
def test_teacher_forcing_attends_as_greedy_decoding_did(family, inputs):
    """The answer is the model's own; its attention is watched call by call, with a cache."""
    stock, steps = family(DOUBLE, "eager"), 4
    if family is mllama:  # a batch with left padding is NaN in eager float64
        inputs = alone(inputs, 0)
    with Watched(stock) as watched, torch.no_grad():
        out = stock.generate(**inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False)
    answer = out[:, -steps:]
    found = answer_attention(family(DOUBLE), inputs, answer, torch.ones_like(answer, dtype=torch.bool))
    for sample, scores in enumerate(found.scores):
        expected = torch.zeros_like(scores)
        for call in watched.calls:
            expected += mean_of_rows([layer[sample : sample + 1] for layer in call], [-1]) / steps
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)
    assert torch.equal(found.answer, answer)


@given(st.lists(st.integers(1, 5), min_size=3, max_size=3), st.integers(0, 9))
@settings(deadline=None, max_examples=10)
def test_padding_of_a_short_answer_means_nothing(lengths, seed):
    inputs = mllama_inputs(["tt4ttt", "t1tt", "tt2tttt"], dtype=DOUBLE)
    answer, written = answers(lengths, seed)
    found = answer_attention(mllama(DOUBLE), inputs, answer, written).scores
    other = torch.where(written, answer, -100)
    longer = torch.cat([other, torch.full((3, 2), 7)], dim=1)
    flags = torch.cat([written, torch.zeros(3, 2, dtype=torch.bool)], dim=1)
    assert torch.equal(answer_attention(mllama(DOUBLE), inputs, longer, flags).scores, found)
    for sample, length in enumerate(lengths):
        rows = slice(sample, sample + 1)
        (scores,) = answer_attention(
            mllama(DOUBLE), alone(inputs, sample), answer[rows, :length], written[rows, :length]
        ).scores
        torch.testing.assert_close(scores, found[sample, : len(scores)], rtol=0, atol=1e-9)


def test_a_sample_without_an_image_gets_no_scores():
    inputs = mllama_inputs(["t4ttt", "tttt"], dtype=DOUBLE)
    found = answer_attention(mllama(DOUBLE), inputs, *answers([2, 3]))
    assert found.rows.tolist() == [2, 0]
    assert not found.scores[1].any()


# Under the policy


@pytest.mark.parametrize("reach", ["onward", "layer"])
@pytest.mark.parametrize(
    ("family", "inputs"),
    [(mllama, mllama_inputs(["4ttt", "4tt"])), (bart, bart_inputs()), (whisper, whisper_inputs())],
)
def test_one_guidance_serves_every_budget(family, inputs, reach):
    if family is whisper:
        inputs = {name: tensor.float() for name, tensor in inputs.items()}
    model = family()
    expected = generate(model, inputs, steps=3)
    answer, written = answers([3] * len(next(iter(inputs.values()))))
    guidance = answer_attention(model, inputs, answer, written)
    before, kept = None, {}
    for ratio in (0.1, 0.25, 0.6, 1.0):
        policy = f"answer-attention:keep_ratio={ratio},reach={reach}"
        with kvprune.compress(model, policy, guide=guidance) as run:
            found = generate(model, inputs, steps=3)
        masks = {layer: selection.to_mask() for layer, selection in run.selections.items()}
        first = next(iter(masks.values()))
        for layer, mask in masks.items():
            assert torch.equal(mask, first), "all layers and heads share one ranking"
            assert before is None or bool((before[layer] <= mask).all()), "KV14"
        before, kept[ratio] = masks, run.report.kept_fraction
        assert run.report.guide == guidance.receipt
        if ratio < 1:
            prefill = list(run.prefill_selections.values())
            assert prefill[0] is None
            assert (prefill[1] is None) == (reach == "layer")
    assert kept[0.1] < kept[0.25] < kept[0.6] < kept[1.0] == 1.0
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])  # BART's padding is not stored, which changes rounding


def test_what_is_kept_is_what_the_answer_attends_to_most():
    model, inputs = mllama(), mllama_inputs(["tt4ttt"])
    guidance = answer_attention(model, inputs, *answers([3]))
    with kvprune.compress(model, "answer-attention:keep_tokens=6", guide=guidance) as run:
        generate(model, inputs, steps=2)
    best = guidance.scores[0].topk(6).indices.sort().values
    assert torch.equal(run.selections[1].indices[0, 0], best)


# Who may use it


@pytest.mark.parametrize("family", [mllama, bart, whisper])
@pytest.mark.parametrize("guide", [None, kvprune.Guide(), "prompt"])
def test_the_reference_is_refused_without_an_answer(family, guide):
    model = family()
    if guide == "prompt":
        guide = kvprune.Guidance(scores=torch.zeros(1, 20), rows=torch.ones(1).long())
    with pytest.raises(GuideError, match=r"kvprune\.answer_attention\(model, inputs, answer, written\)"):
        kvprune.compress(model, "answer-attention", guide=guide)


def test_another_models_attention_is_no_answer_either():
    with pytest.raises(GuideError, match="got a MllamaForConditionalGeneration that was not made from"):
        kvprune.compress(mllama(), "answer-attention", guide=small())


def test_methods_must_not_know_the_answer():
    model, inputs = mllama(), mllama_inputs(["4tt"])
    guidance = answer_attention(model, inputs, *answers([2]))
    assert guidance.receipt.saw_answer
    assert guidance.of(torch.tensor([0])).receipt.saw_answer
    with pytest.raises(GuideError, match=r"policy guided:keep_ratio=0\.5 is a method"):
        kvprune.compress(model, "guided", guide=guidance)
    with pytest.raises(GuideError, match="is a method"):
        kvprune.compress(model, "guided", guide=AnswerGuide(find_adapter(model)(model), torch.tensor([3])))


def test_a_policy_that_holds_a_reference_is_one_too():
    @dataclass(frozen=True, kw_only=True)
    class Holder(kvprune.ScoringPolicy):
        name = "holder"
        needs = frozenset({"guidance"})

        inner: kvprune.CrossKVPolicy

        def score(self, view):
            return view.guidance[:, None]

    policy = Holder(inner=kvprune.get_policy("answer-attention"))
    with pytest.raises(GuideError, match="policy answer-attention is a reference"):
        kvprune.compress(mllama(), policy)


def test_a_guide_of_a_fixed_answer_runs_inside_each_prefill():
    model, inputs = mllama(), mllama_inputs(["tt4ttt", "t1tt"])
    guide = AnswerGuide(find_adapter(model)(model), torch.tensor([5, 6, 7]))
    expected = answer_attention(model, inputs, torch.tensor([[5, 6, 7]] * 2), torch.ones(2, 3).bool())
    policy = "answer-attention:keep_ratio=0.3"
    with kvprune.compress(model, policy, guide=expected) as given_run:
        generate(model, inputs, num_beams=2)
    compression = kvprune.compress(model, policy, guide=guide)
    guide._target = compression._adapter  # the adapter that is attached
    with compression as run:
        generate(model, inputs, num_beams=2)
    assert run.selections == given_run.selections
    assert run.report.guide.saw_answer


# What is refused


@pytest.mark.parametrize(
    ("answer", "written", "message"),
    [
        ([[3, 4]], torch.ones(1, 2).bool(), r"answer is int64, .*got \[\[3, 4\]\]"),
        (torch.ones(1, 2), torch.ones(1, 2).bool(), r"answer is int64, .*got float32 \[1, 2\]"),
        (torch.ones(2).long(), torch.ones(2).bool(), r"one row for each sample, got shape \[2\]"),
        (torch.ones(1, 2).long(), torch.ones(1, 3).bool(), r"of the answer, \[1, 2\], got bool \[1, 3\]"),
        (torch.ones(1, 2).long(), torch.ones(1, 2), r"of the answer, \[1, 2\], got float32 \[1, 2\]"),
        (
            torch.ones(1, 2).long(),
            torch.zeros(1, 2).bool(),
            r"written is true for the first.*got \[\[0, 0\]\]",
        ),
        (torch.ones(1, 2).long(), torch.tensor([[False, True]]), r"written is true for.*got \[\[0, 1\]\]"),
        (torch.ones(1, 0).long(), torch.ones(1, 0).bool(), r"written is true for the first"),
        (torch.ones(2, 2).long(), torch.ones(2, 2).bool(), "answers to 2 prompts, but the model was given 1"),
    ],
)
def test_answers_that_do_not_fit_are_refused(answer, written, message):
    with pytest.raises(GuideError, match=message):
        answer_attention(mllama(), mllama_inputs(["4tt"]), answer, written)


def test_models_that_gave_no_answer_are_refused():
    answer, written = answers([2])
    with pytest.raises(GuideError, match="MllamaModel cannot generate, so it gave no answer"):
        answer_attention(mllama().model, mllama_inputs(["4tt"]), answer, written)
    with pytest.raises(GuideError, match="received no encoder states with these inputs: input_ids"):
        answer_attention(mllama(), mllama_inputs(["ttt"]), answer, written)
    with kvprune.compress(mllama(), "trim"), pytest.raises(NestedCompressionError):
        answer_attention(mllama(), mllama_inputs(["4tt"]), answer, written)


def test_a_long_sound_is_read_in_parts_and_refused():
    model = copy.deepcopy(whisper())
    model.generation_config.no_timestamps_token_id = 63
    model.generation_config.pad_token_id = 62  # the random model begins with token 0
    inputs = {"input_features": torch.randn(1, 8, 250), "attention_mask": torch.ones(1, 250).long()}
    with pytest.raises(GuideError, match=r"reads these inputs in 3 parts with encoder states of their own"):
        answer_attention(model, {**inputs, "return_timestamps": True}, *answers([2]))


@pytest.mark.parametrize(("family", "make"), [(bart, bart_inputs), (whisper, whisper_inputs)])
def test_a_decoder_without_room_for_the_answer_says_so(family, make):
    model, inputs = family(DOUBLE), make()
    config = model.get_decoder().config
    most = config.max_target_positions if family is whisper else config.max_position_embeddings
    fits, written = answers([most] * 3)
    assert answer_attention(model, inputs, fits, written).rows.tolist() == [most] * 3
    match = f"a prompt of 1 tokens and an answer of {most + 1} take {most + 1} positions.*has {most};"
    with pytest.raises(GuideError, match=match):
        answer_attention(model, inputs, *answers([most + 1] * 3))


def test_replay_of_encoder_decoder_models_needs_the_encoder_states_of_a_call():
    adapter = WhisperAdapter(whisper())
    assert type(adapter).replay is EncoderDecoderAdapter.replay
    ids = torch.tensor([[2, 7]])
    with pytest.raises(GuideError, match="a Whisper model can guide only itself"):
        adapter.replay(Prompt({"input_ids": ids}))
    states = torch.randn(1, 50, whisper().config.d_model)
    with pytest.raises(GuideError, match="called with inputs_embeds; pass input_ids"):
        adapter.replay(Prompt({"inputs_embeds": torch.randn(1, 2, 32)}, states), *answers([2]))
    assert adapter.replay(Prompt({"input_ids": ids}, states), *answers([3])) is None


# What it leaves and costs


@pytest.mark.parametrize(
    ("family", "inputs"), [(mllama, mllama_inputs(["t4tt", "2tt"], dtype=DOUBLE)), (bart, bart_inputs())]
)
def test_nothing_is_left_behind_and_everything_is_counted(family, inputs):
    model = copy.deepcopy(family(DOUBLE))
    before = copy.deepcopy(vars(model.generation_config))
    answer, written = answers([3, 2, 1][: len(inputs["input_ids"])])
    guidance = answer_attention(model, inputs, answer, written)
    assert compressing(model) is None
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert vars(model.generation_config) == before
    receipt = guidance.receipt
    assert (receipt.model, receipt.is_target, receipt.runs) == (type(model).__name__, True, 1)
    assert receipt.forward_calls == 2
    prompt = int(inputs["attention_mask"].sum()) if family is mllama else len(answer)
    assert receipt.tokens == 2 * prompt + int(written[:, 1:].sum())
    assert receipt.seconds > 0
    columns = 20 if family is mllama else 7
    heads = 2 if family is mllama else 4
    # Without a cache, one layer at a time: B, H, S, D, keys and values, float64.
    assert receipt.bytes_peak == len(answer) * heads * columns * 8 * 2 * 8
    assert "itself, in a pass before, which was given the answer: 2 forward calls" in str(receipt)
    assert replace(receipt, saw_answer=False) != receipt
