"""`topv` against its transport plan written with loops."""

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
from kvprune_strategies import TopV

from kvprune import Layout
from kvprune.errors import BudgetError, PolicyOptionError

ratios = st.integers(1, 100).map(lambda percent: percent / 100)


def slow_importance(policy, view, sample, columns):
    """What each source gives, by column, if the columns are those of one image."""
    places = view.places[0 if len(view.places) == 1 else sample].tolist()
    unit = {}
    for column in columns:
        vector = view.features[sample, column].double()
        unit[column] = vector / vector.norm() if vector.norm() > 0 else vector
    placed = [places[column] for column in columns if places[column][0] >= 0]
    low = [min(axis) for axis in zip(*placed, strict=True)]
    high = [max(axis) for axis in zip(*placed, strict=True)]
    centre = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
    reach = math.dist(low, high) / 2 if placed else 0

    def cost(source, target):
        feature = float((unit[source] - unit[target]).norm())
        if not float(unit[source].norm()) or not float(unit[target].norm()):
            feature = math.sqrt(2)  # no direction: as if at a right angle
        both = places[source][0] >= 0 and places[target][0] >= 0
        far = (
            1 - math.exp(-(math.dist(places[source], places[target]) ** 2) / (2 * policy.sigma**2))
            if both
            else 1
        )
        off = math.dist(places[source], centre) / reach if places[source][0] >= 0 and reach else 0
        off = off if places[source][0] >= 0 else 1
        return policy.alpha * feature + policy.beta * far + policy.gamma * off

    drawn = dict.fromkeys(columns, 0.0)
    for target in columns:
        weights = {
            source: math.exp(-cost(source, target) / policy.epsilon)
            for source in columns
            if source != target or len(columns) == 1
        }
        total = math.fsum(weights.values())
        for source, weight in weights.items():
            drawn[source] += weight / total
    return drawn


@given(
    st.integers(0, 1000),
    st.sampled_from([0.0, 1.0]),
    st.sampled_from([0.0, 0.7]),
    st.sampled_from([0.0, 0.1]),
)
def test_importance_is_what_targets_draw(seed, alpha, beta, gamma):
    policy = TopV(alpha=alpha, beta=beta, gamma=gamma, sigma=2.0)
    view = make_features(make_visibility([[[1]]], 12), seed=seed, grid=4)
    wanted = slow_importance(policy, view, 0, range(12))
    found = policy.importance(view)[0].tolist()
    assert found == pytest.approx([wanted[column] for column in range(12)], rel=1e-6, abs=1e-9)
    assert sum(found) == pytest.approx(12)  # each target receives mass 1


def test_importance_is_not_the_marginal_of_the_sources():
    found = TopV().importance(make_features(make_visibility([[[1]]], 24), grid=6))[0]
    assert found.std() > 0.1


def test_images_do_not_draw_from_each_other():
    visibility = make_visibility([[[1, 1]]], 6, images=[0, 1])
    view, policy = make_features(visibility), TopV()
    found = policy.importance(view)[0].tolist()
    for columns in (range(6), range(6, 12)):
        wanted = slow_importance(policy, view, 0, columns)
        assert [found[column] for column in columns] == pytest.approx(list(wanted.values()), rel=1e-6)


def test_the_centre_alone_keeps_a_disc():
    view = make_features(make_visibility([[[1]]], 49), grid=7)
    policy = TopV(alpha=0.0, beta=0.0, gamma=1.0, recover=0.0, keep_tokens=13)
    (kept,) = kept_sets(policy.choose(view).onward)[0]
    distance = {column: math.dist(divmod(column, 7), (3, 3)) for column in range(49)}
    assert max(distance[column] for column in kept) <= min(distance[c] for c in distance if c not in kept)


@given(conversations(), ratios)
def test_without_recovery_the_most_important_stay(visibility, ratio):
    policy = TopV(keep_ratio=ratio, recover=0.0)
    view = make_features(visibility)
    found = policy.importance(view)
    kept = kept_sets(policy.choose(view).onward)
    for sample in range(visibility.batch):
        if len(slow_groups(visibility, sample)) > 1:
            continue
        wanted = set()
        for stratum in slow_strata(visibility, sample):
            order = sorted(stratum, key=lambda column, s=sample: (-float(found[s, column]), column))
            wanted |= set(order[: exact_budget(ratio, len(stratum))])
        assert kept[sample][0] == wanted


def test_recovery_gives_a_share_of_the_budget_to_tokens_spread_evenly():
    view = make_features(make_visibility([[[1]]], 64), grid=8)
    without = kept_sets(TopV(keep_tokens=24, recover=0.0).choose(view).onward)[0][0]
    best = kept_sets(TopV(keep_tokens=16, recover=0.0).choose(view).onward)[0][0]
    kept = kept_sets(TopV(keep_ratio=0.375, recover=0.34).choose(view).onward)[0][0]
    assert len(kept) == len(without) == 24
    assert best <= kept
    # The order 0, 32, 16, 48, 8, ... passes over what is kept anyway.
    order = [int(format(turn, "06b")[::-1], 2) for turn in range(64)]
    assert kept - best == set([column for column in order if column not in best][:8])


@given(conversations(), ratios, st.sampled_from([0.0, 0.1, 0.5, 0.9]))
def test_the_budget_is_exact_and_no_image_starves(visibility, ratio, recover):
    view = make_features(visibility)
    kept = kept_sets(TopV(keep_ratio=ratio, recover=recover).choose(view).onward)
    for sample in range(visibility.batch):
        groups = slow_groups(visibility, sample)
        for stratum in slow_strata(visibility, sample):
            inside = sum(bool(group & stratum) for group in groups)
            wanted = max(exact_budget(ratio, len(stratum)), inside)
            assert len(kept[sample][0] & stratum) == wanted
        assert all(kept[sample][0] & group for group in groups)


@given(conversations(), ratios, ratios, st.sampled_from([0.0, 0.1, 0.5]))
def test_a_larger_budget_keeps_a_superset(visibility, one, other, recover):
    view = make_features(visibility)
    few, many = (
        TopV(keep_ratio=ratio, recover=recover).choose(view).onward.to_mask()
        for ratio in sorted([one, other])
    )
    assert not bool((few & ~many).any())


@given(conversations(), ratios)
def test_a_sample_keeps_alone_what_it_keeps_in_a_batch(visibility, ratio):
    view, policy = make_features(visibility), TopV(keep_ratio=ratio)
    together = kept_sets(policy.choose(view).onward)
    for sample in range(visibility.batch):
        assert kept_sets(policy.choose(one_of(view, sample)).onward)[0] == together[sample]


def test_class_tokens_have_no_place_and_can_be_kept():
    visibility = make_visibility([[[1]]], 10)
    layout = Layout.tiles(3, torch.tensor([[1]]), 1, class_token=True)
    view = make_features(visibility, layout_of=lambda: layout)
    policy = TopV()
    wanted = slow_importance(policy, view, 0, range(10))
    assert policy.importance(view)[0].tolist() == pytest.approx(list(wanted.values()), rel=1e-6)
    assert kept_sets(TopV(keep_tokens=1, class_tokens="keep").choose(view).onward) == [[{0}]]
    assert kept_sets(TopV(keep_tokens=1).choose(view).onward) != [[{0}]]


def test_features_without_direction_are_no_nan():
    view = make_features(make_visibility([[[1]]], 8), captured_features=torch.zeros(1, 8, 4))
    assert TopV(keep_ratio=0.5).choose(view).onward.counts.tolist() == [[4]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, "alpha weighs a cost"),
        ({"epsilon": 0.0}, "epsilon is a positive number"),
        ({"sigma": -2.0}, "sigma is a positive number"),
        ({"recover": 1.0}, r"recover is a share of the budget in \[0, 1\)"),
        ({"class_tokens": "drop"}, r"must be rank \| keep"),
    ],
)
def test_wrong_options_are_refused_with_what_would_be_right(options, message):
    with pytest.raises(PolicyOptionError, match=message):
        TopV(**options)


def test_impossible_budgets_are_refused():
    with pytest.raises(BudgetError, match="lies in"):
        TopV(keep_ratio=2.0)
