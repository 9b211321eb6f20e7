"""`divprune` against farthest-point sampling in plain loops."""

import itertools
import math

import pytest
import torch
from helpers import (
    conversations,
    exact_budget,
    kept_sets,
    make_features,
    make_visibility,
    one_of,
    slow_groups,
    slow_strata,
)
from hypothesis import given
from hypothesis import strategies as st
from kvprune_strategies import DivPrune

import kvprune
from kvprune.errors import BudgetError

ratios = st.integers(1, 100).map(lambda percent: percent / 100)


def cosine(one, other):
    lengths = math.hypot(*one) * math.hypot(*other)
    return math.fsum(a * b for a, b in zip(one, other, strict=True)) / lengths if lengths else 0.0


def slow_farthest_first(vectors, count):
    """Positions in the order of picking; distances are rounded, so that equal ones are equal."""
    distance = [[round(1 - cosine(one, other), 9) for other in vectors] for one in vectors]
    left, picked = list(range(len(vectors))), []
    while left and len(picked) < count:
        nearest = {
            token: min(
                [distance[token][other] for other in (picked or range(len(vectors))) if other != token] or [2]
            )
            for token in left
        }
        best = max(nearest.values())
        token = min(token for token in left if nearest[token] == best)
        left.remove(token)
        picked.append(token)
    return picked


@given(conversations(), ratios)
def test_each_stratum_is_thinned_by_farthest_points(visibility, ratio):
    view = make_features(visibility)
    kept = kept_sets(DivPrune(keep_ratio=ratio).choose(view).onward)
    for sample in range(visibility.batch):
        if len(slow_groups(visibility, sample)) > 1:
            continue  # one of each group stays, see below
        wanted = set()
        for stratum in map(sorted, slow_strata(visibility, sample)):
            vectors = view.features[sample, stratum].tolist()
            picked = slow_farthest_first(vectors, exact_budget(ratio, len(stratum)))
            wanted |= {stratum[position] for position in picked}
        assert kept[sample][0] == wanted


@given(conversations(), ratios)
def test_no_image_is_left_without_a_token(visibility, ratio):
    view = make_features(visibility)
    kept = kept_sets(DivPrune(keep_ratio=ratio).choose(view).onward)
    for sample in range(visibility.batch):
        assert all(kept[sample][0] & group for group in slow_groups(visibility, sample))


@given(st.integers(0, 10_000), st.integers(2, 5))
def test_the_smallest_distance_is_at_least_half_of_the_best(seed, count):
    view = make_features(make_visibility([[[1]]], 9), seed=seed, width=3)
    vectors = torch.nn.functional.normalize(view.features[0], dim=-1)
    (kept,) = kept_sets(DivPrune(keep_tokens=count).choose(view).onward)[0]

    def spread(tokens):  # the chord is a metric, and orders pairs as the cosine does
        return min(float((vectors[a] - vectors[b]).norm()) for a, b in itertools.combinations(tokens, 2))

    best = max(spread(tokens) for tokens in itertools.combinations(range(9), count))
    assert spread(kept) >= best / 2 - 1e-9


def test_copies_of_one_token_are_kept_last_and_in_order():
    vectors = torch.tensor([[[1.0, 0], [1, 0], [1, 0], [0, 1], [-1, 0]]], dtype=torch.float64)
    view = make_features(make_visibility([[[1]]], 5), captured_features=vectors)
    order = [kept_sets(DivPrune(keep_tokens=count).choose(view).onward)[0][0] for count in range(1, 6)]
    assert order == [{3}, {0, 3}, {0, 3, 4}, {0, 1, 3, 4}, {0, 1, 2, 3, 4}]


@pytest.mark.parametrize("vectors", [torch.zeros(1, 6, 4), torch.ones(1, 6, 4)])
def test_tokens_that_are_all_alike_are_kept_in_order_and_never_twice(vectors):
    view = make_features(make_visibility([[[1]]], 6), captured_features=vectors)
    kept = DivPrune(keep_ratio=0.5).choose(view).onward
    assert kept.counts.tolist() == [[3]]


@given(conversations(), ratios)
def test_a_sample_keeps_alone_what_it_keeps_in_a_batch(visibility, ratio):
    view, policy = make_features(visibility), DivPrune(keep_ratio=ratio)
    together = kept_sets(policy.choose(view).onward)
    for sample in range(visibility.batch):
        assert kept_sets(policy.choose(one_of(view, sample)).onward)[0] == together[sample]


@given(conversations(), ratios, ratios)
def test_a_larger_budget_keeps_a_superset(visibility, one, other):
    view = make_features(visibility)
    few, many = (DivPrune(keep_ratio=ratio).choose(view).onward.to_mask() for ratio in sorted([one, other]))
    assert not bool((few & ~many).any())


def test_features_of_another_length_point_the_same_way():
    view = make_features(make_visibility([[[1]]], 20))
    longer = make_features(
        make_visibility([[[1]]], 20), captured_features=view.features * torch.arange(1.0, 21)[None, :, None]
    )
    assert DivPrune().choose(view) == DivPrune().choose(longer)


def test_impossible_budgets_are_refused():
    with pytest.raises(BudgetError, match="lies in"):
        DivPrune(keep_ratio=1.5)
    with pytest.raises(BudgetError, match="either keep_ratio or keep_tokens"):
        DivPrune(keep_ratio=0.5, keep_tokens=3)


@pytest.mark.parametrize(("tokens", "kept"), [(500, 49), (576, 57)])
def test_the_published_ratio_is_rounded_up(tokens, kept):
    policy = kvprune.get_policy("divprune:preset=published")
    selection = policy.choose(make_features(make_visibility([[[1]]], tokens))).onward
    assert selection.counts.tolist() == [[kept]]
