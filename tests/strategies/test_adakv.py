"""`adakv` against its rule, one token at a time with plain loops: the heads of a layer share its budget."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from generation import generate, mllama
from helpers import alone, conversations, exact_budget, kept_sets, make_view, make_visibility, visibilities
from hypothesis import assume, given
from hypothesis import strategies as st
from kvprune_strategies import H2O, AdaKV, Norm, Random, SnapKV
from sharing import best_of, groups_of, share_out, visible_of

import kvprune
from kvprune.errors import BudgetError, PolicyOptionError, ScoreError
from kvprune.testing import mllama_inputs

ratios = st.integers(1, 100).map(lambda percent: percent / 100)
alphas = st.sampled_from([0, 0.2, 0.5, 0.7, 1.0])


def kept_by(policy, view):
    return kept_sets(policy.select(view).cache)


def ranked_norms(view, sample):
    """Lengths of values of visible columns by head, from the best to the worst."""
    norms = view.values.double().norm(dim=-1)[sample].tolist()
    visible = visible_of(view.visibility, sample)
    return [sorted((head[column] for column in visible), reverse=True) for head in norms]


def due_at(ranked, alpha):
    """How many tokens all heads keep when a head's share, rounded, first counts each of its tokens."""
    heads, alpha = range(len(ranked)), Fraction(str(alpha))
    scores = sorted(((-score, i, h) for h in heads for i, score in enumerate(ranked[h])))
    assume(all(other - one > 1e-5 * abs(one) for (one, *_), (other, *_) in itertools.pairwise(scores)))
    hits, due = [0] * len(ranked), [[] for _ in heads]
    for kept, (_, _, winner) in enumerate(scores, start=1):
        hits[winner] += 1
        for head in heads:
            share = (1 - alpha) * hits[head] + alpha * Fraction(kept, len(ranked))
            due[head] += [kept] * (math.floor(share + Fraction(1, 2)) - len(due[head]))
    return due


@given(conversations(), ratios, alphas, st.integers(0, 3))
def test_a_head_keeps_a_blend_of_its_hits_and_an_even_share(visibility, ratio, alpha, seed):
    view = make_view(visibility, seed=seed, kv_heads=4)
    kept = kept_by(AdaKV(keep_ratio=ratio, alpha=alpha, scorer=Norm()), view)
    for sample in range(visibility.batch):
        visible = visible_of(visibility, sample)
        even, ranked = exact_budget(ratio, len(visible)), ranked_norms(view, sample)
        due, least = due_at(ranked, alpha), groups_of(visibility, sample)
        counts = share_out(lambda h, i, d=due: -d[h][i], [least] * 4, [len(visible)] * 4, 4 * even)
        norms = view.values.double().norm(dim=-1)[sample].tolist()
        assert kept[sample] == [best_of(norms[h], visible, counts[h]) for h in range(4)]


@given(st.integers(1, 24), st.sampled_from([0.0, 0.2, 0.25, 0.5, 0.8, 1.0]), st.integers(0, 9))
def test_where_the_published_rounding_meets_the_total_it_is_met(even, alpha, seed):
    view = make_view(make_visibility([[[1]]], 24), seed=seed, kv_heads=3)
    ranked = ranked_norms(view, 0)
    best = sorted((-score, h) for h in range(3) for score in ranked[h])[: 3 * even]
    hits = [sum(h == head for _, h in best) for head in range(3)]
    safe = math.floor(Fraction(str(alpha)) * even)
    published = [(1 - Fraction(str(alpha))) * count + safe for count in hits]
    assume(all(share % 1 != Fraction(1, 2) for share in published))
    published = [max(1, round(share)) for share in published]
    assume(sum(published) == 3 * even and alpha * even == safe)
    (kept,) = kept_by(AdaKV(keep_tokens=even, alpha=alpha, scorer=Norm()), view)
    assert [len(head) for head in kept] == published


@given(conversations(), ratios, alphas, st.integers(0, 3))
def test_with_a_floor_each_head_keeps_its_safe_part_and_then_the_best_of_all_heads_stay(
    visibility, ratio, alpha, seed
):
    view = make_view(visibility, seed=seed, kv_heads=4)
    kept = kept_by(AdaKV(keep_ratio=ratio, alpha=alpha, safeguard="floor", scorer=Norm()), view)
    norms = view.values.double().norm(dim=-1).tolist()
    for sample in range(visibility.batch):
        visible = visible_of(visibility, sample)
        even = exact_budget(ratio, len(visible))
        safe = max(1, math.floor(Fraction(str(alpha)) * even))
        ranked = ranked_norms(view, sample)
        counts = share_out(lambda h, place, r=ranked: r[h][place], [safe] * 4, [len(visible)] * 4, 4 * even)
        assert kept[sample] == [best_of(norms[sample][h], visible, counts[h]) for h in range(4)]


@given(conversations(), ratios, st.sampled_from([0, 0.2, 0.7]), st.integers(0, 3))
def test_normalizing_multiplies_by_what_the_best_tokens_hold(visibility, ratio, alpha, seed):
    view = make_view(visibility, seed=seed, kv_heads=4)
    kept = kept_by(AdaKV(keep_ratio=ratio, alpha=alpha, normalize=True, scorer=Norm()), view)
    for sample in range(visibility.batch):
        visible = visible_of(visibility, sample)
        assume(groups_of(visibility, sample) == 1)
        even, ranked = exact_budget(ratio, len(visible)), ranked_norms(view, sample)
        weighed = [[score * sum(head[:even]) / sum(head) for score in head] for head in ranked]
        due = due_at(weighed, alpha)
        counts = share_out(lambda h, i, d=due: -d[h][i], [1] * 4, [len(visible)] * 4, 4 * even)
        norms = view.values.double().norm(dim=-1)[sample].tolist()
        assert kept[sample] == [best_of(norms[h], visible, counts[h]) for h in range(4)]


def test_normalizing_refuses_negative_scores_and_promises_no_superset():
    assert AdaKV().ranks_tokens
    assert not AdaKV(normalize=True).ranks_tokens
    view = make_view(make_visibility([[[1]]], 6))
    with pytest.raises(ScoreError, match=r"'norm' gave -\d.*; write normalize=False"):
        AdaKV(normalize=True, scorer=Norm(keep="low")).select(view)


@given(visibilities() | conversations(), ratios, alphas, st.sampled_from(["blend", "floor"]), st.booleans())
def test_heads_together_keep_the_budget(visibility, ratio, alpha, safeguard, normalize):
    policy = AdaKV(keep_ratio=ratio, alpha=alpha, safeguard=safeguard, normalize=normalize, scorer=Norm())
    kept = kept_by(policy, make_view(visibility))
    for sample in range(visibility.batch):
        visible = visible_of(visibility, sample)
        if not visible:
            continue
        even = exact_budget(ratio, len(visible))
        assert sum(map(len, kept[sample])) == 2 * max(even, groups_of(visibility, sample))
        if safeguard == "floor":
            assert all(len(head) >= math.floor(Fraction(str(alpha)) * even) for head in kept[sample])


@given(visibilities(), ratios, ratios, alphas, st.sampled_from(["blend", "floor"]))
def test_a_larger_budget_keeps_a_superset_in_every_head(visibility, one, other, alpha, safeguard):
    view = make_view(visibility)
    policies = [
        AdaKV(keep_ratio=ratio, alpha=alpha, safeguard=safeguard, scorer=Norm())
        for ratio in sorted([one, other])
    ]
    small, large = (kept_by(policy, view) for policy in policies)
    for few, many in zip(small, large, strict=True):
        assert all(tokens <= more for tokens, more in zip(few, many, strict=True))


@given(conversations(), ratios, st.integers(0, 3))
def test_an_alpha_of_one_is_the_scorer_itself(visibility, ratio, seed):
    view = make_view(visibility, seed=seed)
    scorer = H2O(keep_ratio=ratio)
    assert kept_by(AdaKV(keep_ratio=ratio, alpha=1, scorer=H2O()), view) == kept_by(scorer, view)


@pytest.mark.parametrize("tokens", range(1, 5))
def test_an_alpha_of_zero_keeps_the_highest_sum_of_scores(tokens):
    view = make_view(make_visibility([[[1]]], 4))
    norms = view.values.double().norm(dim=-1)[0]
    (kept,) = kept_by(AdaKV(keep_tokens=tokens, alpha=0, scorer=Norm()), view)
    got = sum(float(norms[head, column]) for head in range(2) for column in kept[head])
    pairs = list(itertools.product(range(2), range(4)))
    best = max(
        sum(float(norms[pair]) for pair in chosen)
        for chosen in itertools.combinations(pairs, 2 * tokens)
        if len({head for head, _ in chosen}) == 2  # every head keeps one (KV03)
    )
    assert got == pytest.approx(best)


@given(conversations(), ratios)
def test_a_sample_keeps_alone_what_it_keeps_in_a_batch(visibility, ratio):
    view = make_view(visibility, dtype=torch.float32)
    policy = AdaKV(keep_ratio=ratio, scorer=SnapKV(pool="none"))
    together = kept_by(policy, view)
    for sample in range(visibility.batch):
        assert kept_by(policy, alone(view, sample)) == [together[sample]]


def test_equal_scores_are_shared_evenly_and_by_position():
    view = make_view(make_visibility([[[1]] * 3], 10))
    flat = make_view(make_visibility([[[1]] * 3], 10), values=torch.ones_like(view.values))
    assert kept_by(AdaKV(keep_ratio=0.35, scorer=Norm()), flat) == [[set(range(4))] * 2]


def test_heads_with_one_score_keep_the_same():
    view = make_view(make_visibility([[[1]] * 3], 10))
    assert kept_by(AdaKV(keep_ratio=0.4, scorer=Random()), view) == kept_by(Random(keep_ratio=0.4), view)


def test_a_head_with_all_the_high_scores_gets_what_is_not_safe_with_others():
    view = make_view(make_visibility([[[1]]], 20))
    loud = view.values * torch.tensor([100.0, 1.0], dtype=torch.float64)[:, None, None]
    view = make_view(make_visibility([[[1]]], 20), values=loud)
    for safeguard in ("blend", "floor"):
        for alpha, quiet in ((0, 1), (0.2, 2), (0.5, 5), (1, 10)):
            policy = AdaKV(keep_ratio=0.5, alpha=alpha, safeguard=safeguard, scorer=Norm())
            (kept,) = kept_by(policy, view)
            assert [len(head) for head in kept] == [20 - quiet, quiet]


def test_bytes_are_those_of_the_longest_head_and_the_fraction_is_the_budget():
    with kvprune.compress(mllama(), "adakv:keep_ratio=0.25,alpha=0,scorer=norm") as run:
        _, _, cache = generate(mllama(), mllama_inputs(["t4ttt"]), steps=2)
    assert run.report.kept_fraction == pytest.approx(0.25)
    assert run.report.warnings == ()
    for layer_idx, selection in run.selections.items():
        assert int(selection.counts.sum()) == 2 * 5
        assert cache.layers[layer_idx].width == int(selection.counts.max())
    assert run.report.bytes_held > run.report.bytes_full // 4
    assert run.report.verify() == run.report.bytes_held


def test_defaults_and_needs():
    assert kvprune.get_policy("adakv") == AdaKV(alpha=0.2, scorer=SnapKV(), keep_ratio=0.5)
    assert AdaKV().needs == {"queries"}
    assert AdaKV(scorer=Norm()).needs == frozenset()


def test_presets_are_the_published_settings():
    snap = {"kernel": 7, "reduction": "max"}
    published = AdaKV(alpha=0.2, scorer=SnapKV(window=32, **snap))
    factory = AdaKV(alpha=0.2, normalize=True, scorer=SnapKV(window=8, **snap))
    assert kvprune.get_policy("adakv:preset=published") == published
    assert kvprune.get_policy("adakv:preset=kvcache-factory") == factory
    assert set(AdaKV.presets) == {"published", "kvcache-factory"}


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("adakv:alpha=1.5", PolicyOptionError, r"alpha of policy 'adakv' .*\[0, 1\], got 1\.5"),
        ("adakv:alpha=-0.1", PolicyOptionError, r"got -0\.1"),
        ("adakv:safeguard=none", PolicyOptionError, r"must be blend \| floor, got 'none'"),
        ("adakv:keep_ratio=2", BudgetError, "keep_ratio"),
        ("adakv:scorer=full", PolicyOptionError, "policy that ranks tokens"),
        ("adakv:scorer=norm(reach=onward)", PolicyOptionError, "sets reach"),
    ],
)
def test_bad_options_are_refused(spec, error, message):
    with pytest.raises(error, match=message):
        kvprune.get_policy(spec)
