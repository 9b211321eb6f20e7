"""`uniform` keeps exactly the budget at even distances, and does not look at content."""

from itertools import pairwise

import pytest
import torch
from helpers import (
    alone,
    conversations,
    exact_budget,
    kept_sets,
    make_view,
    make_visibility,
    slow_decode,
    slow_groups,
    slow_strata,
    visibilities,
)
from hypothesis import given
from hypothesis import strategies as st
from kvprune_strategies import Uniform

import kvprune

ratios = st.integers(1, 1000).map(lambda thousandths: thousandths / 1000)


def keep(visibility, **options):
    return kept_sets(Uniform(**options).select(make_view(visibility)).cache)


@given(st.integers(1, 200), ratios)
def test_gaps_between_kept_tokens_differ_by_at_most_one(columns, ratio):
    ((kept,),) = keep(make_visibility([[[1]]], columns), keep_ratio=ratio)
    assert len(kept) == exact_budget(ratio, columns)
    gaps = [right - left for left, right in pairwise(sorted(kept))]
    assert not gaps or max(gaps) - min(gaps) <= 1
    # Neither end is left out: no stretch is longer than an even share, rounded up.
    widest = -(-columns // len(kept))
    assert min(kept) + 1 <= widest
    assert columns - max(kept) <= widest
    assert all(gap <= widest for gap in gaps)


@pytest.mark.parametrize(
    ("tokens", "kept"),
    [(1, {4}), (2, {2, 7}), (5, {0, 2, 4, 6, 8}), (10, set(range(10))), (99, set(range(10)))],
)
def test_the_strides_of_version_1_over_ten_tokens(tokens, kept):
    assert Uniform.version == 1
    assert keep(make_visibility([[[1]]], 10), keep_tokens=tokens) == [[kept]]


def test_only_visible_tokens_are_counted_by_the_stride():
    # Ten visible tokens with four hidden ones between them.
    visibility = make_visibility([[[1, 0, 1]]], [5, 4, 5])
    assert keep(visibility, keep_tokens=5) == [[{0, 2, 4, 10, 12}]]


@given(conversations(), ratios)
def test_each_sample_keeps_its_own_exact_budget_of_what_decoding_sees(visibility, ratio):
    for sample, heads in enumerate(keep(visibility, keep_ratio=ratio)):
        (kept,) = heads
        seen = slow_strata(visibility, sample)[0]
        assert len(kept) == exact_budget(ratio, len(seen))
        assert kept <= seen


@given(visibilities(), ratios)
def test_no_image_is_starved(visibility, ratio):
    for sample, heads in enumerate(keep(visibility, keep_ratio=ratio)):
        decode = slow_decode(visibility, sample)
        for group in slow_groups(visibility, sample):
            assert heads[0] & group or not group & decode


@given(conversations(), ratios)
def test_reach_onward_puts_a_stride_over_each_stratum(visibility, ratio):
    decision = Uniform(keep_ratio=ratio, reach="onward").select(make_view(visibility))
    for sample, (kept,) in enumerate(kept_sets(decision.onward)):
        for stratum in slow_strata(visibility, sample):
            order = {column: place for place, column in enumerate(sorted(stratum))}
            places = sorted(order[column] for column in kept & stratum)
            assert len(places) == exact_budget(ratio, len(stratum))
            gaps = [right - left for left, right in pairwise(places)]
            assert not gaps or max(gaps) - min(gaps) <= 1


def test_content_does_not_matter():
    visibility = make_visibility([[[1, 0]], [[1, 1]]], 6)
    first, second = (Uniform().select(make_view(visibility, seed=seed)) for seed in (1, 2))
    assert first == second


@given(conversations(), ratios)
def test_a_sample_keeps_alone_what_it_keeps_in_a_batch(visibility, ratio):
    view, policy = make_view(visibility), Uniform(keep_ratio=ratio)
    together = kept_sets(policy.select(view).cache)
    for sample in range(visibility.batch):
        assert kept_sets(policy.select(alone(view, sample)).cache)[0] == together[sample]


def test_uniform_does_not_claim_to_rank_tokens():
    assert not Uniform.ranks_tokens
    assert kvprune.get_policy("uniform") == Uniform(keep_ratio=0.5)
    # Why: a larger budget has another stride.
    visibility = make_visibility([[[1]]], 10)
    ((three,),), ((four,),) = keep(visibility, keep_tokens=3), keep(visibility, keep_tokens=4)
    assert not three <= four


@pytest.mark.parametrize("columns", [7, 10, 49, 100])
def test_no_number_of_tokens_is_uneven(columns):
    visibility = make_visibility([[[1]]], columns)
    for tokens in range(1, columns + 1):
        ((kept,),) = keep(visibility, keep_tokens=tokens)
        gaps = {right - left for left, right in pairwise(sorted(kept))}
        assert len(kept) == tokens
        assert gaps <= {columns // tokens, -(-columns // tokens)}


def test_very_wide_layers_are_counted_in_whole_numbers():
    visibility = make_visibility([[[1]]], 25616)
    view = make_view(visibility, width=1, dtype=torch.float32)
    kept = Uniform(keep_ratio=0.07).select(view).cache
    assert int(kept.counts) == exact_budget(0.07, 25616) == 1794
