"""`trim` against the method's definition: each head's best tokens, written with loops, and their union."""

import dataclasses
import math

import pytest
import torch
from helpers import (
    alone,
    conversations,
    exact_budget,
    kept_sets,
    live_rows,
    make_view,
    make_visibility,
    seen_by_row,
    slow_attention,
    slow_decode,
    slow_groups,
    slow_strata,
    visibilities,
)
from hypothesis import given
from hypothesis import strategies as st
from kvprune_strategies import Trim

import kvprune
from kvprune import Decision
from kvprune.errors import BudgetError, PolicyOptionError

ratios = st.integers(1, 100).map(lambda percent: percent / 100)
QUERY_HEADS = 4


def union_of_heads(view, sample, ratio):
    """Each head's top k of each stratum, all heads together."""
    union = set()
    for head in range(QUERY_HEADS):
        mass = slow_attention(view, sample, head)
        for stratum in slow_strata(view.visibility, sample):
            order = sorted(stratum, key=lambda column, mass=mass: (-mass[column], column))
            union |= set(order[: exact_budget(ratio, len(stratum))])
    return union


def best_ranks(view, sample, stratum):
    """For each column the best rank that any head gives to it within its stratum."""
    best = dict.fromkeys(stratum, math.inf)
    for head in range(QUERY_HEADS):
        mass = slow_attention(view, sample, head)
        order = sorted(stratum, key=lambda column, mass=mass: (-mass[column], column))
        for rank, column in enumerate(order):
            best[column] = min(best[column], rank)
    return best


def onward(view, **options):
    return [heads[0] for heads in kept_sets(Trim(**options).select(view).onward)]


# k_ratio


@given(conversations(), ratios, st.integers(0, 3))
def test_k_ratio_keeps_the_union_of_each_heads_best(visibility, ratio, seed):
    view = make_view(visibility, seed=seed)
    decision = Trim(k_ratio=ratio).select(view)
    for sample in range(visibility.batch):
        union = union_of_heads(view, sample, ratio)
        decode = slow_decode(visibility, sample)
        assert kept_sets(decision.onward)[sample] == [union]
        assert kept_sets(decision.cache)[sample] == [union & decode if decode else union]


@given(visibilities(), ratios)
def test_k_ratio_keeps_as_many_tokens_as_the_union_has_wherever_that_leaves_one_for_each_image(
    visibility, ratio
):
    view = make_view(visibility)
    for sample, kept in enumerate(onward(view, k_ratio=ratio)):
        union = union_of_heads(view, sample, ratio)
        for stratum in slow_strata(visibility, sample):
            groups = [group for group in slow_groups(visibility, sample) if group & stratum]
            if all(group & union for group in groups):
                assert kept & stratum == union & stratum


def test_k_ratio_keeps_the_whole_union_although_a_second_image_keeps_its_best_token():
    # Both images are seen by the same row; all heads look at the first one.
    visibility = make_visibility([[[1, 1]]], 4, images=[0, 1])
    view = make_view(visibility)
    keys = view.keys.clone()
    keys[:, :, :4] = 0
    keys[:, :, :4, 0] = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    keys[:, :, 4:] = 0
    queries = torch.zeros_like(view.queries)
    queries[..., 0] = 1
    view = dataclasses.replace(view.capturing(queries=queries), keys=keys)
    assert union_of_heads(view, 0, 0.25) == {0, 1}
    (kept,) = onward(view, k_ratio=0.25)
    assert kept >= {0, 1}
    assert kept & {4, 5, 6, 7}


@given(conversations(), ratios)
def test_k_ratio_keeps_between_k_and_heads_times_k(visibility, ratio):
    view = make_view(visibility)
    for sample, kept in enumerate(onward(view, k_ratio=ratio)):
        for stratum in slow_strata(visibility, sample):
            k = exact_budget(ratio, len(stratum))
            assert k <= len(kept & stratum) <= min(QUERY_HEADS * k, len(stratum))


# keep_ratio


@given(conversations(), ratios, st.integers(0, 3))
def test_keep_ratio_keeps_exactly_the_budget_of_each_stratum_by_best_rank(visibility, ratio, seed):
    view = make_view(visibility, seed=seed)
    for sample, kept in enumerate(onward(view, keep_ratio=ratio)):
        strata = slow_strata(visibility, sample)
        assert kept <= set().union(*strata)
        mass = [slow_attention(view, sample, head) for head in range(QUERY_HEADS)]
        for stratum in strata:
            best = best_ranks(view, sample, stratum)
            order = sorted(
                stratum, key=lambda c, best=best, mass=mass: (best[c], -math.fsum(row[c] for row in mass), c)
            )
            assert kept & stratum == set(order[: exact_budget(ratio, len(stratum))])


@given(visibilities(), ratios)
def test_keep_ratio_keeps_exactly_the_budget_or_one_token_of_each_group(visibility, ratio):
    for sample, kept in enumerate(onward(make_view(visibility), keep_ratio=ratio)):
        for stratum in slow_strata(visibility, sample):
            groups = [group for group in slow_groups(visibility, sample) if group & stratum]
            assert len(kept & stratum) == max(exact_budget(ratio, len(stratum)), len(groups))
            assert all(kept & group for group in groups)


@given(visibilities(), ratios, st.sampled_from(["k_ratio", "keep_ratio"]))
def test_no_live_row_is_starved(visibility, ratio, mode):
    for sample, kept in enumerate(onward(make_view(visibility), **{mode: ratio})):
        assert kept
        for row in live_rows(visibility, sample):
            assert kept & seen_by_row(visibility, sample, row)


@given(visibilities(), ratios, ratios, st.sampled_from(["k_ratio", "keep_ratio"]))
def test_a_larger_budget_keeps_a_superset(visibility, one, other, mode):
    view = make_view(visibility)
    few, many = (onward(view, **{mode: ratio}) for ratio in sorted([one, other]))
    assert all(small <= large for small, large in zip(few, many, strict=True))


@given(st.integers(1, 30), st.integers(1, 4), ratios, st.integers(0, 5))
def test_both_modes_are_one_rule(columns, text_rows, ratio, seed):
    view = make_view(make_visibility([[[1]] * text_rows], columns), seed=seed)
    (union,) = onward(view, k_ratio=ratio)
    # Half a token less is rounded up to the size of the union.
    (same,) = onward(view, keep_ratio=(len(union) - 0.5) / columns)
    assert same == union


# what it looks at


@given(conversations(), ratios, st.sampled_from(["k_ratio", "keep_ratio"]))
def test_a_sample_keeps_alone_what_it_keeps_in_a_batch(visibility, ratio, mode):
    view = make_view(visibility, dtype=torch.float32)
    together = onward(view, **{mode: ratio})
    for sample in range(visibility.batch):
        assert onward(alone(view, sample), **{mode: ratio}) == [together[sample]]


def test_padding_tiles_are_not_counted_and_not_kept():
    # Ten tokens in each tile; one of four tiles is filled.
    visibility = make_visibility([[[1, 0, 0, 0]] * 3], 10)
    (kept,) = onward(make_view(visibility), keep_ratio=0.3)
    assert len(kept) == 3
    assert kept <= set(range(10))


def test_dead_rows_do_not_vote():
    rows = [[[1]] * 4]
    all_rows = make_view(make_visibility(rows, 20))
    some = make_visibility(rows, 20, live=[[True, False, False, True]])
    queries = all_rows.queries[:, :, [0, 3]]
    short = make_view(
        make_visibility([[[1]] * 2], 20), keys=all_rows.keys, values=all_rows.values, captured_queries=queries
    )
    assert onward(dataclasses.replace(all_rows, visibility=some)) == onward(short)
    assert onward(short) != onward(all_rows)


def test_a_sample_without_an_image_keeps_the_first_tokens_of_all():
    visibility = make_visibility([[[0, 0]], [[1, 0]]], 4)
    kept = onward(make_view(visibility), keep_ratio=0.5)
    assert kept[0] == {0, 1, 2, 3}
    assert len(kept[1]) == 2


def test_a_batch_in_which_only_one_sample_gets_a_new_image_is_decided():
    visibility = make_visibility([[[0, 1]], [[1, 0]]], 4, images=[0, 1]).from_column(4)
    assert len(onward(make_view(visibility), keep_ratio=0.5)[0]) == 2


def test_a_row_that_sees_only_an_earlier_image_does_not_spoil_the_ranking():
    whole = make_visibility([[[1, 0], [0, 1]]], 6, images=[0, 1])
    later = make_view(whole.from_column(6))
    voters = make_view(
        make_visibility([[[1]]], 6),
        keys=later.keys,
        values=later.values,
        captured_queries=later.queries[:, :, 1:],
    )
    assert onward(later) == onward(voters)


def test_later_layers_decide_nothing():
    view = make_view(make_visibility([[[1]]], 6))
    for rank in (1, 2):
        assert Trim().select(dataclasses.replace(view, rank=rank)) == Decision()


def test_the_cache_of_the_first_layer_is_cropped_unless_told_otherwise():
    view = make_view(make_visibility([[[1, 0], [0, 1]]], 6, images=[0, 1]))
    cropped, whole = Trim().select(view), Trim(crop_first=False).select(view)
    assert cropped.onward == whole.onward
    assert whole.cache is None
    (kept,) = kept_sets(cropped.onward)[0]
    assert kept_sets(cropped.cache) == [[kept & set(range(6, 12))]]
    assert cropped.cache.indices.shape[1] == 1


def test_trim_needs_queries_and_nothing_else():
    view = make_view(make_visibility([[[1]]], 6), captured_raw_keys=None)
    assert Trim().needs == {"queries"}
    assert onward(view)
    with pytest.raises(PolicyOptionError, match=r"view\.queries"):
        Trim().select(view.capturing(queries=None))


# options


def test_a_number_of_tokens_is_a_budget_of_the_union():
    view = make_view(make_visibility([[[1]] * 3] * 2, [8]))
    assert [len(kept) for kept in onward(view, keep_tokens=3)] == [3, 3]
    assert onward(view, keep_tokens=2) == onward(view, keep_ratio=0.25)
    assert Trim(keep_tokens=3).exact_budget == kvprune.Budget(keep_tokens=3)


def test_half_of_the_visible_tokens_are_kept_by_default():
    assert kvprune.get_policy("trim") == Trim(keep_ratio=0.5)
    assert Trim(k_ratio=0.25).keep_ratio is None
    assert Trim(k_ratio=0.25).requested == {"k_ratio": 0.25}
    assert Trim(k_ratio=0.25).exact_budget is None
    assert Trim.ranks_tokens


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("trim:k_ratio=0", r"k_ratio.*got 0\.0"),
        ("trim:k_ratio=1.5", r"k_ratio.*got 1\.5"),
        ("trim:k_ratio=-0.1", r"k_ratio.*got -0\.1"),
        ("trim:keep_ratio=2", r"keep_ratio.*got 2\.0"),
        ("trim:k_ratio=0.5,keep_ratio=0.5", r"keep_ratio=0\.5 and k_ratio=0\.5"),
    ],
)
def test_an_impossible_budget_is_refused_by_its_own_name(spec, message):
    with pytest.raises(BudgetError, match=message):
        kvprune.get_policy(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("trim:k_ratio=nan", "'k_ratio' of policy 'trim' must be number or none, got 'nan'"),
        ("trim:crop_first=1", "'crop_first' of policy 'trim' must be true or false, got '1'"),
        ("trim:k_tokens=5", "policy 'trim' has no option 'k_tokens'"),
    ],
)
def test_wrong_options_are_refused_with_what_would_be_right(spec, message):
    with pytest.raises(PolicyOptionError, match=message):
        kvprune.get_policy(spec)
