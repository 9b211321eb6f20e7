"""`keydiff`: minus the cosine to the mean direction of the keys that are seen."""

import dataclasses
import math

import pytest
import torch
from helpers import (
    alone,
    conversations,
    exact_budget,
    kept_sets,
    make_view,
    make_visibility,
    slow_strata,
    visibilities,
)
from hypothesis import given
from hypothesis import strategies as st
from kvprune_strategies import KeyDiff

import kvprune

ratios = st.integers(1, 100).map(lambda percent: percent / 100)


def slow_scores(view, sample, head):
    """Minus the cosine between each key and the mean direction of its stratum; 0 for unseen columns."""
    keys = view.keys[sample, head].double().tolist()
    scores = [0.0] * len(keys)
    for stratum in slow_strata(view.visibility, sample):
        units = {c: [x / math.hypot(*keys[c]) for x in keys[c]] for c in stratum}
        anchor = [math.fsum(u[d] for u in units.values()) / len(units) for d in range(len(keys[0]))]
        for column, unit in units.items():
            dot = math.fsum(a * u for a, u in zip(anchor, unit, strict=True))
            scores[column] = -dot / math.hypot(*anchor)
    return scores


@given(st.one_of(visibilities(), conversations()), st.integers(0, 3))
def test_scores_are_minus_the_cosine_to_the_mean_direction(visibility, seed):
    view = make_view(visibility, seed=seed)
    expected = [[slow_scores(view, b, h) for h in range(2)] for b in range(visibility.batch)]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(KeyDiff().score(view), expected, rtol=1e-9, atol=1e-9)


@given(conversations(patches=8), ratios)
def test_each_head_keeps_the_least_typical(visibility, ratio):
    view = make_view(visibility)
    kept = kept_sets(KeyDiff(keep_ratio=ratio).select(view).cache)
    for sample in range(visibility.batch):
        seen = slow_strata(visibility, sample)[0]
        for head in range(2):
            scores = slow_scores(view, sample, head)
            order = sorted(seen, key=lambda column, scores=scores: (-scores[column], column))
            assert kept[sample][head] == set(order[: exact_budget(ratio, len(seen))])


@given(st.integers(0, 9), ratios)
def test_lengths_of_keys_and_rotations_do_not_matter(seed, ratio):
    view, policy = make_view(make_visibility([[[1]]], 20), seed=seed), KeyDiff(keep_ratio=ratio)
    generator = torch.Generator().manual_seed(seed + 100)
    lengths = torch.rand(1, 2, 20, 1, generator=generator, dtype=torch.float64) * 9 + 0.1
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))
    for keys in (view.keys * lengths, view.keys @ rotation):
        assert policy.select(dataclasses.replace(view, keys=keys)) == policy.select(view)


def test_more_copies_of_a_token_make_it_less_worth_keeping():
    view = make_view(make_visibility([[[1]]], 8))
    copied = view.keys.clone()
    copied[:, :, 4:] = copied[:, :, :1]
    before, after = (KeyDiff().score(dataclasses.replace(view, keys=k)) for k in (view.keys, copied))
    assert bool((after[..., 0] < before[..., 0]).all())


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_tiny_and_huge_keys_are_ranked_as_others(factor):
    view = make_view(make_visibility([[[1]]], 12), dtype=torch.float32)
    scaled = dataclasses.replace(view, keys=view.keys * factor)
    torch.testing.assert_close(KeyDiff().score(scaled), KeyDiff().score(view))


def test_zero_keys_and_opposite_keys_score_zero():
    view = make_view(make_visibility([[[1]]], 2))
    opposite = torch.cat([view.keys[:, :, :1], -view.keys[:, :, :1]], dim=2)
    for keys in (torch.zeros_like(view.keys), opposite):
        assert KeyDiff().score(dataclasses.replace(view, keys=keys)).abs().max() == 0


def test_the_mean_is_over_visible_columns_and_needs_no_queries():
    view = make_view(make_visibility([[[1, 0]]], 6), captured_queries=None, captured_raw_keys=None)
    keys = view.keys.clone()
    keys[:, :, 6:] = 100
    assert torch.equal(KeyDiff().score(dataclasses.replace(view, keys=keys)), KeyDiff().score(view))
    assert kvprune.get_policy("keydiff") == KeyDiff(keep_ratio=0.5)


def test_equal_scores_keep_the_first_tokens_and_keys_stay():
    view = make_view(make_visibility([[[1]]], 6))
    before = view.keys.clone()
    KeyDiff().select(view)
    assert torch.equal(view.keys, before)
    equal = dataclasses.replace(view, keys=torch.ones_like(view.keys))
    assert kept_sets(KeyDiff().select(equal).cache) == [[{0, 1, 2}, {0, 1, 2}]]


@given(conversations(patches=5), ratios, st.sampled_from(["layer", "onward"]))
def test_a_sample_keeps_alone_what_it_keeps_in_a_batch(visibility, ratio, reach):
    view, policy = make_view(visibility), KeyDiff(keep_ratio=ratio, reach=reach)
    together = kept_sets(policy.select(view).cache)
    for sample in range(visibility.batch):
        assert kept_sets(policy.select(alone(view, sample)).cache)[0] == together[sample]
