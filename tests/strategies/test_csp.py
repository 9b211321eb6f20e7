"""`csp`: a quota for the image and one for the text, against plain loops."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import pytest
import torch
from generation import TOLERANCE, bart, generate, mllama
from helpers import exact_budget, kept_sets, live_rows, seen_by_row, slow_decode, slow_groups
from hypothesis import given, settings
from hypothesis import strategies as st
from kvprune_strategies import CSP, SnapKV

import kvprune
from kvprune.errors import BudgetError, PolicyOptionError, UnsupportedModelError
from kvprune.testing import LayerProblem, check_policy, masked_oracle, mllama_inputs
from kvprune.testing.cutting import cut_text, cut_to_sample
from kvprune.testing.strategies import layer_problems

problems = layer_problems(contents=("random",), dtypes=("float64",))


def slow_weights(query, keys, null_keys, scaling):
    """n-softmax of one row over keys, in plain floats."""
    logits = [scaling * math.fsum(q * k for q, k in zip(query, key, strict=True)) for key in keys]
    total = null_keys + math.fsum(math.exp(logit) for logit in logits)
    return [math.exp(logit) / total for logit in logits]


def slow_scores(queries, keys, sample, kv_head, rows, columns_of, scaling, null_keys):
    """Sum of weights by column, over rows and the query heads of a KV head."""
    groups = queries.shape[1] // keys.shape[1]
    scores = [0.0] * keys.shape[2]
    for head in range(kv_head * groups, (kv_head + 1) * groups):
        for row in rows:
            columns = sorted(columns_of(row))
            query = queries[sample, head, row].tolist()
            weights = slow_weights(query, keys[sample, kv_head, columns].tolist(), null_keys, scaling)
            for column, weight in zip(columns, weights, strict=True):
                scores[column] += weight
    return scores


def best(scores, among, count):
    return set(sorted(among, key=lambda column: (-scores[column], column))[:count])


@settings(deadline=None, max_examples=40)
@given(problems, st.sampled_from([0.1, 0.5, 1.0]), st.sampled_from([1, 2, 9]), st.sampled_from([0.0, 1.0]))
def test_image_tokens_are_those_of_the_reference(problem, ratio, window, null_keys):
    policy = CSP(keep_ratio=ratio, window=window, null_keys=null_keys)
    view = problem.view()
    kept = kept_sets(policy.select(view).cache)
    see = view.visibility
    for sample in range(view.batch):
        seen = slow_decode(see, sample)
        if not seen or len(slow_groups(see, sample)) > 1:
            continue
        rows = [row for row in live_rows(see, sample) if seen_by_row(see, sample, row) & seen][-window:]
        for head in range(view.heads):
            scores = slow_scores(
                view.queries,
                view.keys,
                sample,
                head,
                rows,
                lambda row, s=sample: seen_by_row(see, s, row),
                view.scaling,
                null_keys,
            )
            assert kept[sample][head] == best(scores, seen, exact_budget(ratio, len(seen)))


@settings(deadline=None, max_examples=40)
@given(problems, st.sampled_from([0.01, 0.4, 0.7, 1.0]), st.sampled_from([1, 2, 9]), st.sampled_from([1, 3]))
def test_text_entries_are_those_of_the_reference(problem, text_keep, window, recent):
    policy = CSP(text_keep=text_keep, window=window, recent=recent)
    text = problem.text()
    kept = kept_sets(policy.select_text(text))
    for sample in range(text.batch):
        real = text.real[sample].nonzero().flatten().tolist()
        count = exact_budget(text_keep, len(real))
        last = real[-min(recent, count) :]
        for head in range(text.heads):
            scores = slow_scores(
                text.queries,
                text.keys,
                sample,
                head,
                real[-window:],
                lambda row, r=real: [entry for entry in r if entry <= row],
                text.scaling,
                1.0,
            )
            expected = set(last) | best(scores, set(real) - set(last), count - len(last))
            assert kept[sample][head] == expected
            assert len(kept[sample][head]) == count


def test_one_row_ranks_the_same_with_and_without_null_keys():
    """(i) The null key only takes a part of each row; with one row, the order cannot change."""
    view = LayerProblem(layouts=("4t",), patches=1, dtype="float64").view()
    picked = [CSP(window=1, null_keys=n).select(view).cache for n in (0.0, 1.0, 50.0)]
    assert picked[0] == picked[1] == picked[2]
    last = torch.tensor([[False, True]])
    plain, with_null = view.attention_mass(last), view.attention_mass(last, null_keys=1.0)
    logits = (view.queries @ view.keys.mT * view.scaling)[:, :, 1]
    total = logits.exp().sum(-1)
    assert torch.allclose(with_null.sum(-1), total / (total + 1), atol=1e-12)
    assert (with_null.sum(-1) < 1).all()
    assert torch.allclose(view.attention_mass(last, null_keys=1e-12), plain, atol=1e-9)


@settings(deadline=None, max_examples=200)
@given(
    st.integers(0, 40),
    st.integers(1, 5),
    st.integers(1, 40),
    st.integers(1, 20),
    st.sampled_from([0.05, 0.2, 0.5, 0.9, 1.0]),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.integers(1, 6),
)
def test_both_pools_together_meet_the_budget(image, cross_layers, text, text_layers, total, share, recent):
    """(ii) What is kept in all layers is the target, give or take rounding in each layer and the floors."""
    policy = CSP(total_ratio=total, cross_share=share, recent=recent)
    (cross, own), note = policy.split(image, cross_layers, text, text_layers)
    assert min(1, image) <= cross <= image
    assert min(text, recent) <= own <= text
    everything = cross_layers * image + text_layers * text
    target = math.ceil(Fraction(str(total)) * everything)
    kept = cross_layers * cross + text_layers * own
    floor = cross_layers * min(1, image) + text_layers * min(text, recent)
    assert kept <= max(target, floor) + cross_layers
    assert kept > min(target, everything) - cross_layers - text_layers
    wanted = math.ceil(Fraction(str(share)) * target / cross_layers)
    assert bool(note) == (image > 0 and cross != wanted)
    if share == 1.0 and image > wanted:
        assert own <= max(min(text, recent), 0)


def test_all_shares_to_one_side():
    """(ii) c = 1 leaves text its recent part; c = 0 leaves images one token, as long as text has room."""
    assert CSP(total_ratio=0.2, cross_share=1.0, recent=2).split(100, 2, 30, 4)[0] == (28, 2)
    assert CSP(total_ratio=0.1, cross_share=0.0, recent=2).split(100, 2, 60, 4)[0][0] == 1
    assert "no share" in CSP(total_ratio=0.1, cross_share=0.0).split(100, 2, 60, 4)[1]
    (cross, own), note = CSP(total_ratio=0.5, cross_share=0.0).split(100, 2, 10, 4)
    assert (cross, own) == (40, 10)
    assert "text cannot hold" in note
    (cross, own), note = CSP(total_ratio=0.5, cross_share=1.0).split(10, 2, 100, 4)
    assert (cross, own) == (10, 47)
    assert "images cannot have" in note


@settings(deadline=None, max_examples=25)
@given(problems, st.sampled_from([0.1, 0.5, 0.9]))
def test_shared_budgets_count_each_samples_own_entries(problem, total):
    policy = CSP(total_ratio=total, recent=1)
    view = problem.view()
    images, texts = kept_sets(policy.select(view).cache), kept_sets(policy.select_text(view.text))
    for sample in range(view.batch):
        seen, groups = slow_decode(view.visibility, sample), slow_groups(view.visibility, sample)
        real = int(view.text.real[sample].sum())
        (cross, own), _ = policy.split(len(seen), view.num_layers, real, view.text.num_layers)
        assert {len(kept) for kept in texts[sample]} == {own}
        if seen:
            least = sum(bool(group & seen) for group in groups)
            assert {len(kept & seen) for kept in images[sample]} == {max(cross, least)}


@settings(deadline=None, max_examples=25)
@given(problems, st.sampled_from([CSP(total_ratio=0.4), CSP(keep_ratio=0.3, text_keep=0.5)]))
def test_a_sample_alone_keeps_what_it_keeps_in_a_batch(problem, policy):
    view = problem.view()
    first = [int(row.to(torch.uint8).argmax()) for row in view.text.real]
    together, texts = kept_sets(policy.select(view).cache), kept_sets(policy.select_text(view.text))
    for sample in range(view.batch):
        alone = cut_to_sample(view, problem, sample)
        assert kept_sets(policy.select(alone).cache)[0] == together[sample]
        text = cut_text(view.text, slice(sample, sample + 1), first[sample])
        moved = [{entry + first[sample] for entry in kept} for kept in kept_sets(policy.select_text(text))[0]]
        assert moved == texts[sample]


def test_ties_go_to_the_first():
    view = LayerProblem(layouts=("1tttt",), patches=8, content="equal").view()
    assert kept_sets(CSP(keep_ratio=0.5).select(view).cache)[0][0] == {0, 1, 2, 3}
    zero = dataclasses.replace(view.text, queries=view.text.queries * 0)
    assert kept_sets(CSP(text_keep=0.6, window=1, recent=1).select_text(zero))[0][0] == {0, 1, 4}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"text_keep": 0.0}, PolicyOptionError, r"text_keep of policy 'csp' is in \(0, 1\], got 0.0"),
        ({"text_keep": 1.5}, PolicyOptionError, "text_keep"),
        ({"total_ratio": 0.0}, PolicyOptionError, "total_ratio"),
        ({"total_ratio": 0.5, "cross_share": 1.5}, PolicyOptionError, r"cross_share .* in \[0, 1\], got 1.5"),
        ({"window": 0}, PolicyOptionError, "window of policy 'csp' is at least 1, got 0"),
        ({"recent": 0}, PolicyOptionError, "recent of policy 'csp' is at least 1"),
        ({"null_keys": -1.0}, PolicyOptionError, "null_keys of policy 'csp' is at least 0"),
        ({"null_keys": math.inf}, PolicyOptionError, "null_keys"),
        ({"keep_ratio": 0.5, "total_ratio": 0.5}, PolicyOptionError, "keep_ratio=0.5 and total_ratio=0.5"),
        ({"text_keep": 0.5, "total_ratio": 0.5}, PolicyOptionError, "either total_ratio"),
        ({"keep_ratio": 1.5}, BudgetError, "keep_ratio"),
        ({"keep_ratio": 0.5, "keep_tokens": 3}, BudgetError, "either"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        CSP(**options)


def test_the_preset_is_the_published_budget():
    assert kvprune.get_policy("csp:preset=published") == CSP(total_ratio=0.2, cross_share=0.25)
    assert set(CSP.presets) == {"published"}


@settings(deadline=None, max_examples=20)
@given(problems, st.sampled_from([0.1, 0.5]))
def test_without_null_keys_the_defaults_are_snapkv_without_pooling(problem, ratio):
    """Its text half is off, unless an option turns it on."""
    view = problem.view()
    plain = CSP(keep_ratio=ratio, null_keys=0.0).select(view).cache
    assert plain == SnapKV(keep_ratio=ratio, pool="none", window=16).select(view).cache


def test_what_it_needs_and_asks():
    assert CSP().needs == {"queries"}
    assert CSP(text_keep=0.5).needs == {"queries", "text_cache"}
    assert CSP(total_ratio=0.5).needs == {"queries", "text", "text_cache"}
    assert CSP().requested == {"keep_ratio": 0.5}
    assert CSP(keep_tokens=4, text_keep=0.5).requested == {"keep_tokens": 4, "text_keep": 0.5}
    assert CSP(total_ratio=0.3).requested == {"total_ratio": 0.3, "cross_share": 0.5}
    assert CSP(total_ratio=0.3).exact_budget is None


@pytest.mark.parametrize("spec", ["csp", "csp:keep_ratio=0.2,text_keep=0.4", "csp:total_ratio=0.3;recent=1"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_equals_the_oracle(spec, beams):
    model, inputs = mllama(torch.float32), mllama_inputs(("tt4ttt", "t1tt", "tt2tttttt", "tttt"))
    with kvprune.compress(model, spec) as run:
        _, logits, _ = generate(model, inputs, num_beams=beams)
    with masked_oracle(model, run.selections, run.prefill_selections, text_selections=run.text_selections):
        _, expected, _ = generate(model, inputs, num_beams=beams)
    assert (logits - expected).abs().max() <= TOLERANCE[torch.float32]
    assert bool(run.text_selections) == (spec != "csp")


def test_without_text_options_it_is_for_all_models():
    with kvprune.compress(bart(), "csp:keep_ratio=0.25") as run:
        bart().generate(input_ids=torch.full((1, 8), 9), max_new_tokens=3)
    assert run.report.kept_fraction == 0.25
    with pytest.raises(UnsupportedModelError, match="needs 'text_cache', which the BART adapter"):
        kvprune.compress(bart(), "csp:text_keep=0.5")


def test_overflow_is_reported():
    model, inputs = mllama(), mllama_inputs(("tt4ttt",))
    with kvprune.compress(model, "csp:total_ratio=0.5,cross_share=0.1") as run, torch.no_grad():
        model(**inputs)
    assert any("text cannot hold all of its share" in warning for warning in run.report.warnings)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["csp:text_keep=0.5", "csp:total_ratio=0.3"])
def test_pruned_text_passes_the_suite(spec):
    assert check_policy(spec, examples=10).passed
