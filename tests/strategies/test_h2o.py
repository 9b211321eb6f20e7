"""`h2o`: the mean attention of the rows that see a token, head by head."""

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
    slow_strata,
    visibilities,
)
from hypothesis import given
from hypothesis import strategies as st
from kvprune_strategies import H2O

import kvprune
from kvprune.errors import PolicyOptionError

ratios = st.integers(1, 100).map(lambda percent: percent / 100)
anything = st.one_of(visibilities(), conversations())


def slow_scores(view, sample, kv_head, normalize):
    see = view.visibility
    heads = [slow_attention(view, sample, head) for head in (2 * kv_head, 2 * kv_head + 1)]
    scores = [math.fsum(column) / 2 for column in zip(*heads, strict=True)]
    if not normalize:
        return scores
    seen = [seen_by_row(see, sample, row) for row in live_rows(see, sample)]
    return [score / max(1, sum(c in row for row in seen)) for c, score in enumerate(scores)]


@given(anything, st.booleans(), st.integers(0, 3))
def test_scores_are_the_mean_or_the_sum_over_the_rows_that_see_a_token(visibility, normalize, seed):
    view = make_view(visibility, seed=seed)
    expected = [
        [slow_scores(view, sample, head, normalize) for head in range(2)]
        for sample in range(visibility.batch)
    ]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(H2O(normalize=normalize).score(view), expected, rtol=1e-10, atol=1e-12)


@given(conversations(), ratios)
def test_each_head_keeps_the_heaviest(visibility, ratio):
    view = make_view(visibility)
    kept = kept_sets(H2O(keep_ratio=ratio).select(view).cache)
    for sample in range(visibility.batch):
        seen = slow_strata(visibility, sample)[0]
        for head in range(2):
            scores = slow_scores(view, sample, head, normalize=True)
            order = sorted(seen, key=lambda column, scores=scores: (-scores[column], column))
            assert kept[sample][head] == set(order[: exact_budget(ratio, len(seen))])


@given(anything)
def test_undivided_scores_add_up_to_the_number_of_live_rows(visibility):
    scores = H2O(normalize=False).score(make_view(visibility))
    rows = visibility.live.sum(-1).double()[:, None].expand(-1, 2)
    torch.testing.assert_close(scores.sum(-1), rows)


def test_dividing_helps_the_later_image_that_fewer_rows_saw():
    # Three rows see the first image, the last one of them sees the second, too.
    visibility = make_visibility([[[1, 0], [1, 0], [1, 1]]], 4, images=[0, 1])
    view = make_view(visibility)
    view = dataclasses.replace(view, keys=torch.zeros_like(view.keys))  # attention is even
    divided, undivided = (H2O(normalize=flag).score(view)[0, 0] for flag in (True, False))
    # 1/4 from each of two rows and 1/8 from the last, against 1/8 alone.
    torch.testing.assert_close(undivided, torch.tensor([0.625] * 4 + [0.125] * 4, dtype=torch.float64))
    torch.testing.assert_close(divided, torch.tensor([0.625 / 3] * 4 + [0.125] * 4, dtype=torch.float64))


def test_options_and_needs():
    assert kvprune.get_policy("h2o") == H2O(keep_ratio=0.5, normalize=True)
    assert kvprune.get_policy("h2o:preset=published") == H2O(normalize=False)
    assert H2O().needs == {"queries"}
    with pytest.raises(PolicyOptionError, match="must be true or false, got 'maybe'"):
        kvprune.get_policy("h2o:normalize=maybe")


def test_equal_scores_keep_the_first_tokens():
    view = make_view(make_visibility([[[1]] * 2], 6))
    equal = dataclasses.replace(view, keys=torch.ones_like(view.keys))
    assert kept_sets(H2O().select(equal).cache) == [[{0, 1, 2}, {0, 1, 2}]]


@given(conversations(), ratios, st.sampled_from(["layer", "onward"]))
def test_a_sample_keeps_alone_what_it_keeps_in_a_batch(visibility, ratio, reach):
    view, policy = make_view(visibility), H2O(keep_ratio=ratio, reach=reach)
    together = kept_sets(policy.select(view).cache)
    for sample in range(visibility.batch):
        assert kept_sets(policy.select(alone(view, sample)).cache)[0] == together[sample]
