"""A small Mllama guides a larger one that has learned to see: left padding, unequal tiles, rereading."""

from __future__ import annotations

import copy

import pytest
import torch
from generation import generate
from guidance import alone
from PIL import Image
from small_guides import untrained_guide

import kvprune
from kvprune import demo
from kvprune.errors import GuideError
from kvprune.testing import masked_oracle

SIZES = ((224, 224), (112, 112), (112, 224))
"""Sizes of pictures: four tiles, one and two."""

QUESTIONS = ("how many ?", "?", "which digit is from left to right ?")
STEPS = 4


@pytest.fixture(scope="module")
def target():
    return demo.load(dtype=torch.float64)[0]


@pytest.fixture(scope="module")
def guide():
    return untrained_guide(1).double()


@pytest.fixture(scope="module")
def inputs():
    processor = demo.load()[1]
    generator = torch.Generator().manual_seed(0)
    images, prompts = [], []
    for size, question in zip(SIZES, QUESTIONS, strict=True):
        noise = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
        images.append([Image.fromarray(noise.numpy())])
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        prompts.append(processor.apply_chat_template(turn, add_generation_prompt=True))
    found = processor(
        images=images, text=prompts, padding=True, add_special_tokens=False, return_tensors="pt"
    )
    assert found["attention_mask"][:, 0].tolist() == [0, 0, 1], "padded on the left"
    assert found["aspect_ratio_mask"].sum((1, 2)).tolist() == [4, 1, 2]
    return {**found, "pixel_values": found["pixel_values"].double()}


@pytest.mark.parametrize("reread", [False, True])
def test_guided_generation_equals_the_masked_model(target, guide, inputs, reread):
    with kvprune.compress(target, "guided:keep_ratio=0.2", guide=guide, reread=reread) as run:
        sequences, logits, _ = generate(target, inputs, STEPS)
    with masked_oracle(target, run.selections, run.prefill_selections, reread=reread):
        expected_sequences, expected, _ = generate(target, inputs, STEPS)
    assert torch.equal(sequences, expected_sequences)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    cost = run.report.guide
    assert (cost.model, cost.is_target, cost.forward_calls) == ("MllamaForConditionalGeneration", False, 1)
    assert cost.tokens == int(inputs["attention_mask"].sum())
    # One layer at a time, with one head of 16 where the target has two of 32: 3 samples, keys and values.
    assert cost.bytes_peak == 3 * 1 * 260 * 16 * 2 * 8


def test_the_guide_and_not_the_target_decides(target, guide, inputs):
    kept = []
    for one in (guide, untrained_guide(2).double(), None):
        with kvprune.compress(target, "guided:keep_ratio=0.2", guide=one) as run:
            generate(target, inputs, 1)
        kept.append(run.selections[1].to_mask())
        assert kept[-1].sum(-1)[:, 0].tolist() == [52, 13, 26], "a fifth of 260, 65 and 130 tokens"
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])


def test_a_sample_is_answered_alone_as_in_a_batch(target, guide, inputs):
    answers = []
    for batch in (inputs, *(alone(inputs, sample) for sample in range(3))):
        with kvprune.compress(target, "guided:keep_ratio=0.2", guide=guide, reread=True):
            out, _, _ = generate(target, batch, STEPS, min_new_tokens=STEPS)
        answers.append(out[:, batch["input_ids"].shape[1] :])
    assert [answer[0].tolist() for answer in answers[1:]] == answers[0].tolist()


@pytest.mark.parametrize("reread", [False, True])
def test_early_exit_takes_the_guides_answer_or_asks_the_target_under_its_ranking(
    target, guide, inputs, reread
):
    def run(threshold):
        return kvprune.guided_generate(
            target,
            inputs,
            guide=guide,
            policy="guided:keep_ratio=0.2",
            threshold=threshold,
            max_new_tokens=STEPS,
            reread=reread,
        )

    by_guide, by_target = run(0.0), run(1.01)
    start = inputs["input_ids"].shape[1]
    stock = guide.generate(**inputs, max_new_tokens=STEPS, do_sample=False)[:, start:]
    options = kvprune.Guide(guide, max_new_tokens=STEPS)
    with kvprune.compress(target, "guided:keep_ratio=0.2", guide=options, reread=reread) as compressed:
        guided = target.generate(**inputs, max_new_tokens=STEPS, do_sample=False)[:, start:]
    for out, expected in ((by_guide, stock), (by_target, guided)):
        for answer, row in zip(out.answers, expected.tolist(), strict=True):
            assert answer.tolist() == row[: len(answer)]
    assert by_guide.report is None
    assert by_target.report.rereads == compressed.report.rereads == reread
    middle = run(sorted(by_guide.scores)[1])
    assert sorted(middle.by_guide) == [False, True, True]
    for sample, taken in enumerate(middle.by_guide):
        expected = (by_guide if taken else by_target).answers[sample]
        assert middle.answers[sample].tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("vision", "text", "difference"),
    [
        ({"image_size": 56}, {}, r"image size, columns per tile"),
        ({"patch_size": 28}, {}, r"patch size, columns per tile"),
        ({"max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}, {}, "tiles per image"),
        ({}, {"vocab_size": 20}, "vocabulary"),
    ],
)
def test_another_geometry_is_refused_and_named(target, vision, text, difference):
    other = untrained_guide(vision=vision, **text)
    with pytest.raises(GuideError, match=rf"has another geometry \({difference}"):
        kvprune.compress(target, "guided", guide=other)
    with pytest.raises(GuideError, match=rf"has another geometry \({difference}"):
        kvprune.guided_generate(target, {}, guide=other, threshold=0.5, max_new_tokens=STEPS)


def test_a_guide_leaves_both_models_as_they_were(target, guide, inputs):
    before = copy.deepcopy([target.state_dict(), guide.state_dict()])
    expected = [generate(model, inputs, STEPS)[1] for model in (target, guide)]
    with kvprune.compress(target, "guided:keep_ratio=0.1", guide=guide, reread=True):
        generate(target, inputs, STEPS)
    for model, logits, weights in zip((target, guide), expected, before, strict=True):
        assert torch.equal(generate(model, inputs, STEPS)[1], logits)
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
