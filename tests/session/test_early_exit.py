"""Early exit: whose answer is taken, the two scores, and that the target is not called in vain."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from generation import bart, mllama
from guidance import alone, probe, small

import kvprune
from kvprune.errors import BudgetError, GuideError
from kvprune.testing import mllama_inputs

STEPS = 4
LAYOUTS = ["tt4ttt", "t1tt", "tt2tttt"]


def inputs_of(layouts=LAYOUTS):
    return mllama_inputs(layouts, dtype=torch.float64)


def target():
    return mllama(torch.float64)


def guide(seed=2):
    return small(dtype=torch.float64, seed=seed)


def answer_of(model, inputs):
    """What a stock model answers, by sample."""
    out = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
    return out[:, inputs["input_ids"].shape[1] :]


def counting(model):
    """Count the forward calls of a model until the handle is removed."""
    calls = []
    return calls, model.register_forward_pre_hook(lambda *call: calls.append(1))


def run(threshold, model=None, **options):
    options = {"guide": guide(), "policy": "guided:keep_ratio=0.3", "max_new_tokens": STEPS} | options
    return kvprune.guided_generate(model or target(), inputs_of(), threshold=threshold, **options)


def rows(out):
    return [answer.tolist() for answer in out.answers]


def test_the_guides_answer_is_what_the_stock_guide_says_and_the_target_is_not_called():
    model = copy.deepcopy(target())
    calls, handle = counting(model)
    out = run(0.0, model)
    handle.remove()
    assert not calls
    assert out.by_guide == (True,) * 3
    assert out.report is None
    assert rows(out) == answer_of(guide(), inputs_of()).tolist()
    assert out.guide.forward_calls == STEPS + 2  # generation, the ranking, and the consistency


def test_above_one_every_sample_goes_to_the_target_under_the_guides_ranking():
    out = run(1.01)
    assert out.by_guide == (False,) * 3
    with kvprune.compress(
        target(), "guided:keep_ratio=0.3", guide=kvprune.Guide(guide(), max_new_tokens=STEPS)
    ):
        expected = answer_of(target(), inputs_of())
    assert rows(out) == expected.tolist()
    assert out.report.kept_fraction == pytest.approx(0.3, abs=0.05)
    assert out.report.guide == out.guide


def test_each_sample_is_decided_on_its_own_and_put_back_in_its_place():
    scores = run(0.0).scores
    assert len(set(scores)) == 3
    middle = sorted(scores)[1]
    out = run(middle)
    assert out.by_guide == tuple(score >= middle for score in scores)
    ours, theirs = rows(run(0.0)), rows(run(1.01))
    assert ours != theirs
    assert rows(out) == [ours[n] if taken else theirs[n] for n, taken in enumerate(out.by_guide)]
    assert out.report.encoder_inputs == 1
    assert len(out.report.kept_per_sample) == 1


def test_calls_of_the_target_grow_with_the_threshold():
    scores = run(0.0).scores
    called = [run(t).by_guide.count(False) for t in (-1.0, 0.0, *sorted(scores), 1.0, 1.0001)]
    assert called == sorted(called)
    assert called[:2] == [0, 0]
    assert called[-1] == 3


def slow_probabilities(model, sample_inputs, answer, hidden=()):
    """Probability rows of a stock model for each token of an answer, by calls without a cache.

    Args:
        hidden: Columns that are masked in all cross-attention layers.
    """
    found = []
    inputs = dict(sample_inputs)

    def mask(module, args, kwargs):
        additive = kwargs["cross_attention_mask"]
        if additive is None:
            additive = torch.zeros(1, 1, 1, 20, dtype=torch.float64)
        additive = additive.clone()
        additive[..., list(hidden)] = torch.finfo(torch.float64).min
        return args, {**kwargs, "cross_attention_mask": additive}

    layers = [model.model.language_model.layers[index] for index in (1, 2)]
    handles = [layer.register_forward_pre_hook(mask, with_kwargs=True) for layer in layers] if hidden else []
    try:
        for token in answer:
            with torch.no_grad():
                logits = model(**inputs, use_cache=False).logits[0, -1].tolist()
            highest = max(logits)
            weights = [math.exp(logit - highest) for logit in logits]
            found.append([weight / math.fsum(weights) for weight in weights])
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            more = inputs["cross_attention_mask"]
            inputs["cross_attention_mask"] = torch.cat([more, more[:, -1:]], 1)
    finally:
        for handle in handles:
            handle.remove()
    return found


@pytest.mark.parametrize("length_normalised", [True, False])
@pytest.mark.parametrize("ends_early", [True, False])
def test_both_scores_against_calls_of_the_stock_guide(length_normalised, ends_early):
    """One token at a time, with the dropped columns masked."""
    model, layout, ratio = guide(), "4ttt", 0.2
    inputs = inputs_of([layout])
    if ends_early:
        model.generation_config.eos_token_id = int(answer_of(model, inputs)[0, 2])
    answer = answer_of(model, inputs)[0].tolist()
    assert len(answer) == (3 if ends_early else STEPS)
    options = kvprune.Guide(model, max_new_tokens=STEPS)
    out = kvprune.guided_generate(
        target(),
        inputs,
        guide=options,
        threshold=0,
        max_new_tokens=STEPS,
        consistency_ratio=ratio,
        length_normalised=length_normalised,
    )
    assert rows(out) == [answer]
    plain = slow_probabilities(model, inputs, answer)
    confidence = math.prod(max(row) for row in plain) ** (1 / len(answer))
    assert out.confidence[0] == pytest.approx(confidence, rel=1e-4)
    views = []
    with kvprune.compress(target(), probe(views), guide=options), torch.no_grad():
        target()(**inputs, use_cache=True)
    order = views[0].guidance[0].argsort(descending=True).tolist()
    hidden = order[math.ceil(ratio * 20) :]
    few = slow_probabilities(model, inputs, answer, hidden)
    product = math.prod(row[token] for row, token in zip(few, answer, strict=True))
    expected = product ** (1 / len(answer)) if length_normalised else product
    assert out.consistency[0] == pytest.approx(expected, rel=1e-4)
    assert out.scores[0] == pytest.approx((confidence + expected) / 2, rel=1e-4)


@pytest.mark.parametrize("layouts", [LAYOUTS, ["tt4tt1tt", "t2tt", "14ttt"]])
def test_scores_of_a_sample_are_the_same_alone(layouts):
    options = {"guide": guide(), "threshold": 0.0, "max_new_tokens": STEPS}
    together = kvprune.guided_generate(target(), inputs_of(layouts), **options)
    for sample in range(len(layouts)):
        one = kvprune.guided_generate(target(), alone(inputs_of(layouts), sample), **options)
        assert one.confidence[0] == pytest.approx(together.confidence[sample], rel=1e-4)
        assert one.consistency[0] == pytest.approx(together.consistency[sample], rel=1e-4)
        assert rows(one) == [rows(together)[sample]]


def test_the_score_is_the_mean_or_the_product_of_both():
    mean, product = (run(0.0, combine=how) for how in ("mean", "product"))
    assert mean.confidence == product.confidence
    pairs = list(zip(mean.confidence, mean.consistency, strict=True))
    assert mean.scores == pytest.approx([(a + b) / 2 for a, b in pairs])
    assert product.scores == pytest.approx([a * b for a, b in pairs])
    between = (max(product.scores) + min(mean.scores)) / 2
    assert max(product.scores) < between < min(mean.scores)
    assert run(between, combine="mean").by_guide == (True,) * 3
    assert run(between, combine="product").by_guide == (False,) * 3


def test_a_model_may_guide_itself():
    out = run(0.0, guide=kvprune.Guide())
    assert out.guide.is_target
    assert rows(out) == answer_of(target(), inputs_of()).tolist()
    assert run(2.0, guide=kvprune.Guide()).by_guide == (False,) * 3


def test_the_result_is_json():
    data = json.loads(json.dumps(run(sorted(run(0.0).scores)[1]).to_dict()))
    assert data["guide"]["forward_calls"] == STEPS + 2
    assert data["report"]["policy"]["name"] == "guided"
    assert [len(data[name]) for name in ("answers", "scores", "confidence", "consistency")] == [3] * 4
    assert run(0.0).to_dict()["report"] is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"policy": "trim"}, GuideError, "does not use a guide"),
        ({"max_new_tokens": 0}, GuideError, "max_new_tokens is a whole number, 1 or more, got 0"),
        ({"threshold": float("nan")}, GuideError, "threshold is a number"),
        ({"threshold": "0.5"}, GuideError, "threshold is a number"),
        ({"combine": "max"}, GuideError, "combine is 'mean' or 'product', got 'max'"),
        ({"guide": bart()}, GuideError, "takes no part"),
        ({"consistency_ratio": 0.0}, BudgetError, "got 0.0"),
    ],
)
def test_what_cannot_be_is_refused_before_any_model_runs(options, error, message):
    small_model, model = guide(), copy.deepcopy(target())
    options = {"guide": small_model, "threshold": 0.5, "max_new_tokens": STEPS} | options
    calls, handle = counting(model)
    calls_of_guide, handle_of_guide = counting(small_model)
    with pytest.raises(error, match=message):
        kvprune.guided_generate(model, inputs_of(), **options)
    handle.remove()
    handle_of_guide.remove()
    assert not calls
    assert not calls_of_guide


def test_the_target_reads_its_prompts_again_and_the_guide_does_not():
    once, again = run(1.1), run(1.1, reread=True)
    assert (once.report.rereads, again.report.rereads) == (0, 1)
    assert once.guide.forward_calls == again.guide.forward_calls
    assert (once.scores, once.report.bytes_held) == (again.scores, again.report.bytes_held)
