"""What a reconstruction reads and writes does not depend on the question, and attention is that of stock."""

from __future__ import annotations

import pytest
import torch
from generation import bart, generate, mllama, whisper
from transformers import MllamaModel
from transformers.modeling_outputs import BaseModelOutput

import kvprune
from kvprune.adapters.tiny.families import TINY_FAMILIES
from kvprune.errors import GuideError, UnsupportedModelError
from kvprune.session.reconstruction import BoundReconstruction
from kvprune.testing import masked_oracle, mllama_inputs, tiny_bart

SPEC = "kvzip:keep_ratio=0.3,max_new_tokens=4"


def texts():
    ids = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, 9).long()
    mask[1, :3] = 0  # padded on the left
    return {"input_ids": ids * mask, "attention_mask": mask}


def inputs_of(family):
    if family is mllama:
        return mllama_inputs(["tt4tt1tt", "t2tt"])
    return texts() if family is bart else {"input_features": torch.randn(2, 8, 100)}


def kept(model, inputs, spec=SPEC, **options):
    with kvprune.compress(model, spec) as run:
        generate(model, inputs, 2, **options)
    return run


@pytest.mark.parametrize("family", [mllama, bart, whisper])
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_equals_the_oracle(family, beams):
    model, inputs = family(), inputs_of(family)
    with kvprune.compress(model, SPEC) as run:
        sequences, logits, _ = generate(model, inputs, 3, num_beams=beams)
    with masked_oracle(model, run.selections, run.prefill_selections):
        expected, oracle, _ = generate(model, inputs, 3, num_beams=beams)
    assert torch.equal(sequences, expected)
    assert (logits - oracle).abs().max() <= 1e-5


def test_two_questions_about_a_picture_keep_the_same_tokens():
    one, other = mllama_inputs(["t4ttt", "tt2tttt"]), mllama_inputs(["ttt4tttttt", "t2t"])
    for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        other[name] = one[name]
    first, second = kept(mllama(), one), kept(mllama(), other)
    assert not torch.equal(one["input_ids"][0, -3:], other["input_ids"][0, -3:])
    assert first.selections.keys() == second.selections.keys()
    for layer, selection in first.selections.items():
        assert torch.equal(selection.to_mask(), second.selections[layer].to_mask())


def test_whisper_keeps_the_same_frames_whatever_its_prompt_says():
    inputs = inputs_of(whisper)
    runs = [
        kept(whisper(), {**inputs, "decoder_input_ids": torch.tensor([ids] * 2)})
        for ids in ([1, 7], [1, 9, 4])
    ]
    for layer, selection in runs[0].selections.items():
        assert torch.equal(selection.to_mask(), runs[1].selections[layer].to_mask())


@pytest.mark.parametrize("family", [mllama, bart, whisper])
def test_a_sample_keeps_alone_what_it_keeps_in_a_batch(family):
    inputs = inputs_of(family)
    if family is mllama:
        inputs = mllama_inputs(["t4ttt", "tt2tttt"])
    together = kept(family(), inputs, SPEC).selections
    for sample in range(2):
        alone = kept(family(), {name: tensor[sample : sample + 1] for name, tensor in inputs.items()}, SPEC)
        for layer, selection in alone.selections.items():
            assert torch.equal(selection.to_mask()[0], together[layer].to_mask()[sample])


def test_scores_are_the_largest_attention_of_the_stock_model_over_its_own_text(monkeypatch):
    model, inputs, seen = tiny_bart(1, attn_implementation="eager"), texts(), []
    ask = BoundReconstruction.ask

    def noted(self, prompt, **options):
        seen.append(ask(self, prompt, **options))
        return seen[-1]

    monkeypatch.setattr(BoundReconstruction, "ask", noted)
    run = kept(model, inputs)
    (guidance,) = seen
    assert run.report.guide.forward_calls == 1
    assert run.report.guide.tokens == 2 * 1 + 8 + 5
    for sample in range(2):
        text = inputs["input_ids"][sample][inputs["attention_mask"][sample].bool()]
        start = torch.tensor([model.config.decoder_start_token_id])
        with torch.no_grad():
            out = model(
                input_ids=inputs["input_ids"][sample : sample + 1],
                attention_mask=inputs["attention_mask"][sample : sample + 1],
                decoder_input_ids=torch.cat([start, text[:-1]])[None],
                output_attentions=True,
            )
        for layer, weights in zip(guidance.layers, out.cross_attentions, strict=True):
            heads = weights[0].amax(1).unflatten(0, (layer.shape[1], -1)).amax(1)  # [Hkv, S]
            assert (layer[sample] - heads).abs().max() < 1e-6


def test_the_report_says_what_it_cost_and_what_is_missing():
    run = kept(mllama(), mllama_inputs(["t4ttt"]))
    assert run.report.guide.is_target
    assert run.report.guide.forward_calls == 4 + 1
    assert not run.report.guide.saw_answer
    warnings = " ".join(run.report.warnings)
    assert "prompt_ids" in warnings
    assert "cut at 4 tokens" in warnings
    asked = kept(mllama(), mllama_inputs(["t4ttt"]), SPEC + ",prompt_ids=5 6 7")
    assert "unprompted" not in " ".join(asked.report.warnings)


def test_refusals():
    with pytest.raises(UnsupportedModelError, match="cannot generate"):
        kvprune.compress(MllamaModel(mllama().config), SPEC).__enter__()
    for name, reason in (
        ("Florence2ForConditionalGeneration", "reads the question together with the picture"),
        ("MoonshineForConditionalGeneration", "no text is known"),
    ):
        with pytest.raises(UnsupportedModelError, match=reason):
            kvprune.compress(TINY_FAMILIES[name].model(name), SPEC).__enter__()
    model, inputs = bart(), texts()
    with pytest.raises(GuideError, match="does not use a guide"):
        kvprune.compress(model, SPEC, guide=kvprune.Guide()).__enter__()
    states = model.get_encoder()(**inputs).last_hidden_state
    outputs = BaseModelOutput(last_hidden_state=states)
    with (
        kvprune.compress(model, SPEC),
        pytest.raises(GuideError, match="pass input_ids, not encoder_outputs"),
    ):
        model(
            encoder_outputs=outputs,
            attention_mask=inputs["attention_mask"],
            decoder_input_ids=torch.tensor([[1], [1]]),
        )
