"""`random` is the control: seeded by seed, layer and content, exact, and the same alone as in a batch."""

import dataclasses

import pytest
import torch
from helpers import alone, conversations, exact_budget, kept_sets, make_view, make_visibility, slow_strata
from hypothesis import given
from hypothesis import strategies as st
from kvprune_strategies import Random

import kvprune

ratios = st.integers(1, 100).map(lambda percent: percent / 100)
PINNED = [{0, 1, 5, 6}, {3, 9, 10, 11}]
WIDE = make_visibility([[[1]], [[1]]], 60)


def keep(view, **options):
    return [heads[0] for heads in kept_sets(Random(**options).select(view).cache)]


@given(conversations(), ratios)
def test_each_sample_keeps_exactly_its_budget_of_what_decoding_sees(visibility, ratio):
    for sample, kept in enumerate(keep(make_view(visibility), keep_ratio=ratio)):
        seen = slow_strata(visibility, sample)[0]
        assert len(kept) == exact_budget(ratio, len(seen))
        assert kept <= seen


def test_heads_share_what_is_kept():
    view = make_view(WIDE, kv_heads=2)
    assert Random().select(view).cache.indices.shape == (2, 1, 30)


def test_the_same_view_keeps_the_same():
    assert keep(make_view(WIDE)) == keep(make_view(WIDE))


def test_the_draws_of_version_1():
    # Other numbers here mean another version, or results of old runs cannot be repeated.
    assert Random.version == 1
    assert keep(make_view(make_visibility([[[1]], [[1]]], 12)), keep_tokens=4) == PINNED


def test_the_kept_tokens_differ_by_sample_layer_and_seed():
    view = make_view(WIDE)
    first, second = keep(view)
    assert first != second
    assert keep(dataclasses.replace(view, rank=1)) != [first, second]
    assert keep(dataclasses.replace(view, seed=1)) != [first, second]


def test_the_kept_tokens_follow_the_content_and_not_the_place_in_the_batch():
    view = make_view(WIDE)
    first, second = keep(view)
    swapped = dataclasses.replace(view, fingerprints=lambda: view.fingerprints().flip(0))
    assert keep(swapped) == [second, first]
    same = dataclasses.replace(view, fingerprints=lambda: torch.tensor([5, 5]))
    assert keep(same)[0] == keep(same)[1]


def test_keys_values_and_queries_do_not_matter():
    view = make_view(WIDE, seed=1, captured_queries=None, captured_raw_keys=None)
    other = dataclasses.replace(view, keys=view.keys * 7 + 1, values=-view.values)
    assert keep(view) == keep(other)


@given(conversations(), ratios, st.integers(0, 3))
def test_a_sample_keeps_alone_what_it_keeps_in_a_batch(visibility, ratio, rank):
    view, policy = make_view(visibility, rank=rank), Random(keep_ratio=ratio)
    together = kept_sets(policy.select(view).cache)
    for sample in range(visibility.batch):
        assert kept_sets(policy.select(alone(view, sample)).cache)[0] == together[sample]


@pytest.mark.parametrize("columns", [12, 18])
def test_columns_that_only_other_samples_have_do_not_change_a_sample(columns):
    # The sample has six columns of its own; the batch makes it as wide as others need.
    exists = [[True] * 6 + [False] * 12, [True] * 18]
    view = make_view(make_visibility([[[1]], [[1]]], 18, exists=exists))
    assert keep(alone(view, 0, 6))[0] == keep(alone(view, 0, columns))[0] == keep(view)[0]


@given(ratios, ratios, st.integers(0, 5))
def test_a_larger_budget_keeps_a_superset(one, other, seed):
    view = dataclasses.replace(make_view(WIDE), seed=seed)
    few, many = (keep(view, keep_ratio=ratio) for ratio in sorted([one, other]))
    assert all(small <= large for small, large in zip(few, many, strict=True))


def test_every_token_is_kept_about_equally_often():
    view = make_view(make_visibility([[[1]]], 20))
    counts = torch.zeros(20)
    for seed in range(400):
        for column in keep(dataclasses.replace(view, seed=seed), keep_tokens=5)[0]:
            counts[column] += 1
    # Expected 100 of 400, standard deviation below 9.
    assert float(counts.min()) > 60
    assert float(counts.max()) < 140


def test_random_decides_at_every_layer_or_once_for_all():
    view = make_view(WIDE)
    assert Random().select(view).onward is None
    onward = Random(reach="onward")
    assert kept_sets(onward.select(view).onward) == [[kept] for kept in keep(view)]
    assert onward.select(dataclasses.replace(view, rank=2)) == kvprune.Decision()
