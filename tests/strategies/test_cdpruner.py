"""`cdpruner` against greedy determinants computed outright."""

import itertools
import math

import pytest
import torch
from helpers import (
    alone,
    conversations,
    kept_sets,
    make_view,
    make_visibility,
    slow_attention,
    slow_groups,
)
from hypothesis import given
from hypothesis import strategies as st
from kvprune_strategies import CDPruner

from kvprune import Decision
from kvprune.errors import BudgetError, PolicyOptionError

ratios = st.integers(1, 100).map(lambda percent: percent / 100)


def with_features(visibility, *, width=6, seed=0, **fields):
    random = torch.Generator().manual_seed(seed)
    features = torch.randn(visibility.batch, visibility.columns, width, generator=random, dtype=torch.float64)
    return make_view(visibility, **({"captured_features": features, "seed": seed} | fields))


def slow_relevance(view, sample, floor, relevance="attention"):
    masses = [slow_attention(view, sample, head) for head in range(4)]
    mean = [sum(column) / 4 for column in zip(*masses, strict=True)]
    if relevance == "log":
        mean = [math.log(mass) for mass in mean]
    if relevance == "rank":
        mean = [sum(other < mass for other in mean) for mass in mean]
    low, high = min(mean), max(mean)
    return [floor + (1 - floor) * ((m - low) / (high - low) if high > low else 1) for m in mean]


def slow_kernel(view, sample, floor, of, relevance="attention"):
    """diag(r) S diag(r) of all columns of a sample."""
    vectors = view.captured.features[sample]
    if of == "keys":
        vectors = torch.cat([view.keys[sample, 0], view.keys[sample, 1]], dim=-1)
    unit = [vector / vector.norm() for vector in vectors.double()]
    weights = slow_relevance(view, sample, floor, relevance)
    return torch.tensor(
        [
            [weights[i] * weights[j] * float(unit[i] @ unit[j]) for j in range(len(unit))]
            for i in range(len(unit))
        ],
        dtype=torch.float64,
    )


def slow_greedy(kernel, count):
    """Each time the token whose addition makes the determinant largest."""
    picked = []
    for _ in range(count):
        volume = {
            token: round(float(torch.linalg.det(kernel[[*picked, token]][:, [*picked, token]])), 12)
            for token in range(len(kernel))
            if token not in picked
        }
        picked.append(max(volume, key=volume.get))
    return picked


@pytest.mark.parametrize("of", ["features", "keys"])
@pytest.mark.parametrize("relevance", ["attention", "log", "rank"])
@given(seed=st.integers(0, 1000), count=st.integers(1, 6), floor=st.sampled_from([0.01, 0.5, 1.0]))
def test_picking_is_greedy_maximisation_of_the_determinant(of, relevance, seed, count, floor):
    view = with_features(make_visibility([[[1]]], 12), seed=seed)
    policy = CDPruner(keep_tokens=count, of=of, floor=floor, relevance=relevance)
    kept = kept_sets(policy.select(view).onward)[0][0]
    assert kept == set(slow_greedy(slow_kernel(view, 0, floor, of, relevance), count))


@pytest.mark.parametrize("relevance", ["attention", "log", "rank"])
def test_equal_attention_is_equal_relevance(relevance):
    view = with_features(make_visibility([[[1]]], 12), keys=torch.ones(1, 2, 12, 4, dtype=torch.float64))
    chosen = [CDPruner(keep_tokens=5, relevance=relevance, floor=floor).select(view) for floor in (0.1, 1.0)]
    assert chosen[0] == chosen[1]


def test_attention_of_zero_has_a_logarithm():
    keys = torch.zeros(1, 2, 12, 4)
    keys[..., 3, :] = 1e4
    view = with_features(make_visibility([[[1]]], 12), keys=keys, dtype=torch.float32)
    assert CDPruner(keep_tokens=5, relevance="log").select(view).onward.counts.tolist() == [[5]]


@given(st.integers(0, 1000))
def test_the_first_pick_is_the_most_relevant_token(seed):
    view = with_features(make_visibility([[[1]]], 12), seed=seed)
    relevance = slow_relevance(view, 0, 0.01)
    kept = kept_sets(CDPruner(keep_tokens=1).select(view).onward)
    assert kept == [[{relevance.index(max(relevance))}]]


def test_equal_relevance_leaves_diversity_alone():
    """Orthogonal groups of twins: one of each comes before any twin, whatever attention says."""
    vectors = torch.eye(4, dtype=torch.float64).repeat(3, 1)[None]
    view = with_features(make_visibility([[[1]]], 12), captured_features=vectors)
    kept = kept_sets(CDPruner(keep_tokens=4, floor=1.0).select(view).onward)[0][0]
    assert {column % 4 for column in kept} == {0, 1, 2, 3}


def test_what_adds_no_volume_comes_last_and_by_relevance():
    vectors = torch.eye(3, dtype=torch.float64).repeat(4, 1)[None]
    view = with_features(make_visibility([[[1]]], 12), captured_features=vectors)
    relevance = slow_relevance(view, 0, 0.01)
    first = kept_sets(CDPruner(keep_tokens=3).select(view).onward)[0][0]
    assert {column % 3 for column in first} == {0, 1, 2}
    rest = sorted(set(range(12)) - first, key=lambda column: -relevance[column])
    for count in range(4, 13):
        assert kept_sets(CDPruner(keep_tokens=count).select(view).onward)[0][0] == first | set(
            rest[: count - 3]
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("vectors", [torch.zeros(1, 9, 4), torch.ones(1, 9, 4)])
def test_degenerate_features_give_the_whole_budget_and_nothing_twice(dtype, vectors):
    view = with_features(make_visibility([[[1]]], 9), captured_features=vectors.to(dtype), dtype=dtype)
    assert CDPruner(keep_ratio=0.5).select(view).onward.counts.tolist() == [[5]]


def test_far_more_tokens_than_dimensions_are_ranked_without_noise():
    visibility = make_visibility([[[1]]], 60)
    single = with_features(visibility, width=3, dtype=torch.float32)
    assert len(set(itertools.chain(*kept_sets(CDPruner(keep_ratio=1.0).select(single).onward)[0]))) == 60


@given(conversations(), ratios, st.sampled_from(["features", "keys"]))
def test_a_sample_keeps_alone_what_it_keeps_in_a_batch(visibility, ratio, of):
    view, policy = with_features(visibility), CDPruner(keep_ratio=ratio, of=of)
    together = kept_sets(policy.select(view).onward)
    for sample in range(visibility.batch):
        single = with_features(visibility)
        cut = alone(single, sample).capturing(features=single.captured.features[sample : sample + 1])
        assert kept_sets(policy.select(cut).onward)[0] == together[sample]
        assert all(together[sample][0] & group for group in slow_groups(visibility, sample))


@given(conversations(), ratios, ratios)
def test_a_larger_budget_keeps_a_superset(visibility, one, other):
    view = with_features(visibility)
    few, many = (CDPruner(keep_ratio=ratio).select(view).onward.to_mask() for ratio in sorted([one, other]))
    assert not bool((few & ~many).any())


def test_only_the_first_layer_decides():
    assert CDPruner().select(with_features(make_visibility([[[1]]], 6), rank=1)) == Decision()


def test_features_are_captured_only_where_they_are_used():
    assert CDPruner().needs == {"queries", "features"}
    assert CDPruner(of="keys").needs == {"queries"}


@pytest.mark.parametrize("floor", [0.0, -1.0, 1.5])
def test_a_floor_outside_its_range_is_refused(floor):
    with pytest.raises(PolicyOptionError, match=r"lies in \(0, 1\], got"):
        CDPruner(floor=floor)


def test_impossible_budgets_are_refused():
    with pytest.raises(BudgetError, match="lies in"):
        CDPruner(keep_ratio=0.0)
