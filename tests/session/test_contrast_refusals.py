"""What a contrast refuses, what it leaves behind, and its rules by themselves."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import dataclass

import pytest
import torch
from families import inputs_of, model_of
from transformers import LogitsProcessor, LogitsProcessorList

import kvprune
from kvprune.errors import (
    CompressionStateError,
    ContrastError,
    NestedCompressionError,
    PolicyOptionError,
    UnsupportedCacheError,
)
from kvprune.session.contrast_rules import Mint, Mod, js_divergence, plausible
from kvprune.session.rules import get_rule

AGAINST = "divprune:keep_ratio=0.3"


def hooks_of(model):
    """Return all hooks of a model, and what stands on its modules besides."""
    return [
        (dict(module._forward_pre_hooks), dict(module._forward_hooks), sorted(vars(module)))
        for module in model.modules()
    ]


def run(family="BART", against=AGAINST, combine="mint", batch="ragged", **options):
    model = model_of(family)
    with kvprune.contrast(model, against, combine) as contrast:
        options = {"max_new_tokens": 3, "do_sample": False} | options
        out = model.generate(**inputs_of(family, batch), **options)
    return out, contrast


@pytest.mark.parametrize("family", ["BART", "Mllama"])
@pytest.mark.parametrize("against", ["full", "lossless", "trim:keep_ratio=1"])
def test_a_policy_that_drops_nothing_is_refused(family, against):
    with pytest.raises(ContrastError, match=r"drops nothing.*divprune:keep_ratio=0\.1"):
        run(family, against)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"use_cache": False}, UnsupportedCacheError, "use_cache=False"),
        ({"cache_implementation": "static"}, UnsupportedCacheError, "'static'"),
        ({"prefill_chunk_size": 2}, ContrastError, "prefill_chunk_size=2"),
        ({"guidance_scale": 2.0}, ContrastError, "guidance_scale=2"),
        ({"prompt_lookup_num_tokens": 2, "batch": "one"}, ContrastError, "assisted decoding"),
    ],
)
def test_ways_of_decoding_that_cannot_be_followed_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        run(**options)


def test_an_assistant_is_refused():
    with pytest.raises(ContrastError, match="assistant_model"):
        run(assistant_model=model_of("BART", torch.float32), batch="one")


def test_a_cache_of_earlier_turns_is_refused():
    model, inputs = model_of("Mllama"), inputs_of("Mllama")
    first = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    more = torch.cat([first.sequences, first.sequences[:, -1:]], 1)
    mask = torch.ones_like(more)
    with (
        kvprune.contrast(model, AGAINST, "mint"),
        pytest.raises(UnsupportedCacheError, match="earlier turns"),
    ):
        model.generate(
            input_ids=more, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=2,
            cross_attention_mask=inputs["cross_attention_mask"][:, -1:].expand(-1, more.shape[1], -1, -1),
        )  # fmt: skip


def test_text_without_an_image_is_refused():
    model = model_of("Mllama")
    ids = torch.tensor([[3, 4, 5]])
    with kvprune.contrast(model, AGAINST, "mint"), pytest.raises(ContrastError, match="no encoder states"):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)


def test_compression_and_contrast_exclude_each_other():
    model = model_of("BART")
    with kvprune.compress(model, AGAINST), pytest.raises(NestedCompressionError):
        kvprune.contrast(model, AGAINST, "mint").attach()
    contrast = kvprune.contrast(model, AGAINST, "mint").attach()
    with pytest.raises(NestedCompressionError, match="contrast with divprune"):
        kvprune.compress(model, AGAINST).attach()
    with pytest.raises(NestedCompressionError):
        kvprune.contrast(model, AGAINST, "mint").attach()
    with pytest.raises(CompressionStateError, match="attached already"):
        contrast.attach()
    contrast.detach()
    contrast.detach()


def test_a_forward_call_alone_is_no_contrast():
    model, inputs = model_of("BART"), inputs_of("BART")
    with (
        pytest.raises(ContrastError, match=r"works in model\.generate"),
        kvprune.contrast(model, AGAINST, "mint"),
    ):
        model(**inputs, decoder_input_ids=inputs["input_ids"][:, :2])


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ContrastError, match="BartModel cannot generate"):
        kvprune.contrast(model_of("BART").model, AGAINST, "mint")


def test_a_policy_that_needs_the_vision_encoder_is_refused():
    with pytest.raises(ContrastError, match="class_attention"):
        kvprune.contrast(model_of("Mllama"), "visionzip", "mint")


@pytest.mark.parametrize("family", ["BART", "Whisper", "Mllama"])
def test_the_model_is_as_before_and_the_first_branch_is_not_touched(family):
    model, inputs = model_of(family), inputs_of(family)
    options = {
        "max_new_tokens": 4,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    before = hooks_of(model)
    stock = model.generate(**inputs, **options)

    @dataclass(frozen=True, kw_only=True)
    class Ignore(kvprune.CombineRule):
        name = "ignore"

        def combine(self, full, pruned, decided):
            return full

    with kvprune.contrast(model, AGAINST, Ignore()) as contrast:
        out = model.generate(**inputs, **options)
    assert hooks_of(model) == before
    assert torch.equal(out.sequences, stock.sequences)
    assert all(map(torch.equal, out.logits, stock.logits))  # bit for bit
    assert contrast.report.full.bytes_cross > contrast.report.pruned.bytes_cross


@pytest.mark.parametrize("family", ["Whisper", "Mllama"])
def test_the_encoder_runs_once(family):
    model = model_of(family)
    encoder = model.model.vision_model if family == "Mllama" else model.get_encoder()
    calls = []
    handle = encoder.register_forward_pre_hook(lambda *call: calls.append(1))
    try:
        run(family)
    finally:
        handle.remove()
    assert len(calls) == 1


def test_the_report_counts_both_branches():
    _, contrast = run("Mllama", combine="mod", max_new_tokens=4, min_new_tokens=4)
    report = contrast.report
    assert (report.generations, report.steps) == (1, 4)
    assert report.full.bytes_text == report.pruned.bytes_text > 0
    assert report.pruned.bytes_cross == report.against.bytes_held < report.against.bytes_full
    assert report.full.bytes_cross == report.against.bytes_full
    assert report.cost > 1
    assert report.decided.shape == (3,)
    assert json.loads(json.dumps(report.to_dict()))["steps"] == 4
    assert "second branch kept" in str(report)


def test_a_second_generate_starts_anew():
    model, inputs = model_of("BART"), inputs_of("BART")
    options = {"max_new_tokens": 4, "do_sample": False}
    with kvprune.contrast(model, AGAINST, "mint") as contrast:
        first = model.generate(**inputs, **options)
        second = model.generate(**inputs, **options)
    assert torch.equal(first, second)
    assert contrast.report.generations == 2


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("mimt", ContrastError, r"mint, mod; did you mean 'mint'\?"),
        ("mint:alpa=1", ContrastError, r"no option 'alpa'.*did you mean 'alpha'\?"),
        ("mint:alpha=-1", ContrastError, "'alpha' of rule 'mint' must be a number of 0 or more, got -1"),
        ("mod:beta=2", ContrastError, r"must be in \[0, 1\], got 2"),
        ("mint:expert=half", PolicyOptionError, r"of rule 'mint' must be pruned \| full"),
        (3, ContrastError, "got 3"),
    ],
)
def test_bad_rules_are_refused(spec, error, message):
    with pytest.raises(error, match=message):
        kvprune.contrast(model_of("BART"), AGAINST, spec)


def test_a_spec_with_options_makes_that_rule():
    assert get_rule("mint:alpha=2,expert=full") == Mint(alpha=2.0, expert="full")
    assert get_rule("mod") == Mod()
    assert get_rule(Mod(beta=0.1)).spec == "mod:agree=4.0,disagree=1.0,threshold=0.05,beta=0.1"


def distributions():
    random = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 9, generator=random, dtype=torch.float64).log_softmax(-1)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("expert", ["pruned", "full"])
def test_equal_branches_leave_the_distribution_as_it_is(alpha, expert):
    full, _ = distributions()
    rule = Mint(alpha=alpha, beta=0.0, expert=expert)
    torch.testing.assert_close(rule.combine(full, full, None), full)


def test_no_strength_leaves_the_expert_alone():
    full, pruned = distributions()
    assert torch.equal(Mint(alpha=0.0, beta=0.0).combine(full, pruned, None), pruned)
    assert torch.equal(Mint(alpha=0.0, beta=0.0, expert="full").combine(full, pruned, None), full)


def test_plausibility_keeps_the_favourite_and_nothing_unlikely():
    full, pruned = distributions()
    only = plausible(pruned, full, 1.0)
    assert torch.equal(only.argmax(-1), full.argmax(-1))
    assert bool((only.isfinite().sum(-1) == 1).all())
    some = plausible(pruned, full, 0.3).isfinite()
    assert torch.equal(some, full.exp() >= 0.3 * full.exp().amax(-1, keepdim=True))


def test_divergence_is_zero_of_equals_and_ln_2_of_strangers():
    full, _ = distributions()
    torch.testing.assert_close(js_divergence(full, full), torch.zeros(4, dtype=torch.float64))
    one = torch.tensor([[0.0, -math.inf]])
    torch.testing.assert_close(js_divergence(one, one.flip(-1)), torch.tensor([math.log(2)]))


def test_a_token_that_is_impossible_stays_impossible():
    full, pruned = distributions()
    full, pruned = (one.index_fill(-1, torch.tensor([2]), -math.inf) for one in (full, pruned))
    for rule in (Mint(), Mint(expert="full"), Mod(), Mod(agree=0.0)):
        scores = rule.combine(full, pruned, rule.begin(full, pruned))
        assert not bool(scores.isnan().any())
        assert bool(scores[:, 2].isneginf().all())


def test_a_second_thread_is_refused_or_answered_rightly():
    model, inputs = model_of("BART"), inputs_of("BART")
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    answers = []

    def work():
        try:
            answers.append(model.generate(**inputs, **options))
        except CompressionStateError:
            answers.append(None)

    with kvprune.contrast(model, AGAINST, "mint"):
        right = model.generate(**inputs, **options)
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(answers) == 3
    assert all(one is None or torch.equal(one, right) for one in answers)


def test_an_error_in_the_second_branch_leaves_the_model_as_before():
    model, before = model_of("BART"), hooks_of(model_of("BART"))
    calls = []

    def fail(*call):
        calls.append(1)
        if len(calls) == 4:
            raise ZeroDivisionError

    handle = model.model.decoder.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        run(max_new_tokens=5)
    handle.remove()
    assert hooks_of(model) == before
    first, second = run()[0], run()[0]
    assert torch.equal(first, second)


def test_contrast_works_in_inference_mode_and_with_attention_weights():
    right, _ = run("Mllama")
    with torch.inference_mode():
        assert torch.equal(run("Mllama")[0], right)
    more = {"output_attentions": True, "output_hidden_states": True, "return_dict_in_generate": True}
    assert torch.equal(run("Mllama", **more)[0].sequences, right)


@pytest.mark.parametrize("combine", ["mint:beta=1", "mod:beta=1"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}])
def test_tokens_that_a_rule_forbids_are_written_if_other_processors_forbid_the_rest(combine, options):
    class Only(LogitsProcessor):
        """Forbid all tokens but two, which the model finds unlikely."""

        def __call__(self, input_ids, scores):
            allowed = torch.zeros_like(scores, dtype=torch.bool)
            allowed[:, [7, 11]] = True
            return scores.masked_fill(~allowed, -torch.inf)

    torch.manual_seed(0)
    out, _ = run("BART", combine=combine, logits_processor=LogitsProcessorList([Only()]), **options)
    assert set(out[:, -3:].flatten().tolist()) <= {7, 11}
