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

import kvprune
from kvprune import Layout
from kvprune.errors import BudgetError, PolicyOptionError

ratios = st.integers(1, 100).map(lambda percent: percent / 100)


def slow_costs(policy, view, sample, columns):
    """The cost of each pair of source and target if the columns are those of one image."""
    places = view.places[0 if len(view.places) == 1 else sample].tolist()
    vectors = {column: view.features[sample, column].double() for column in columns}
    if policy.features == "unit":
        vectors = {
            c: vector / vector.norm() if vector.norm() > 0 else vector for c, vector in vectors.items()
        }
    placed = [places[column] for column in columns if places[column][0] >= 0]
    low = [min(axis) for axis in zip(*placed, strict=True)]
    high = [max(axis) for axis in zip(*placed, strict=True)]
    centre = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
    reach = math.dist(low, high) / 2 if placed else 0

    def of_features(source, target):
        length = float((vectors[source] - vectors[target]).norm())
        if (
            policy.features == "unit"
            and source != target
            and not all(map(any, (vectors[source], vectors[target])))
        ):
            length = math.sqrt(2)  # no direction: as if at a right angle
        return length**2 if policy.square else length

    def in_space(source, target):
        if places[source][0] < 0 or places[target][0] < 0:
            return 1.0
        return 1 - math.exp(-(math.dist(places[source], places[target]) ** 2) / (2 * policy.sigma**2))

    def off_centre(source):
        if places[source][0] < 0:
            return 1.0
        return math.dist(places[source], centre) / reach if reach else 0.0

    pairs = [(source, target) for source in columns for target in columns]
    feature, far = ({pair: one(*pair) for pair in pairs} for one in (of_features, in_space))
    if policy.scale:
        feature, far = ({p: x / (max(one.values()) or 1) for p, x in one.items()} for one in (feature, far))
    return {
        (source, target): policy.alpha * feature[source, target]
        + policy.beta * far[source, target]
        + policy.gamma * off_centre(source)
        for source, target in pairs
        if policy.diagonal or source != target or len(columns) == 1
    }


def slow_importance(policy, view, sample, columns):
    """What each source gives, relative to the mean, by column, if the columns are those of one image."""
    columns = list(columns)
    masses = {column: 1 / len(columns) for column in columns}
    if policy.marginals == "norm":
        lengths = {column: float(view.features[sample, column].double().norm()) for column in columns}
        if sum(lengths.values()):
            masses = {column: length / sum(lengths.values()) for column, length in lengths.items()}
    kernel = {
        pair: math.exp(-cost / policy.epsilon)
        for pair, cost in slow_costs(policy, view, sample, columns).items()
    }
    u, v = dict.fromkeys(columns, 1.0), dict.fromkeys(columns, 1.0)

    def meet_sources():
        for i in columns:
            u[i] = masses[i] / math.fsum(kernel.get((i, j), 0) * v[j] for j in columns)

    def meet_targets():
        for j in columns:
            v[j] = masses[j] / math.fsum(kernel.get((i, j), 0) * u[i] for i in columns)

    if policy.marginals == "free":
        meet_targets()
    else:
        for _ in range(policy.steps):
            for meet in (meet_sources, meet_targets)[:: 1 if policy.last == "targets" else -1]:
                meet()
    return {
        i: len(columns) * math.fsum(u[i] * kernel.get((i, j), 0) * v[j] for j in columns) for i in columns
    }


options = st.fixed_dictionaries(
    {
        "alpha": st.sampled_from([0.0, 1.0]),
        "beta": st.sampled_from([0.0, 0.7]),
        "gamma": st.sampled_from([0.0, 0.1]),
        "sigma": st.just(2.0),
        "epsilon": st.sampled_from([0.3, 2.0]),
        "marginals": st.sampled_from(["norm", "uniform", "free"]),
        "last": st.sampled_from(["targets", "sources"]),
        "steps": st.integers(1, 4),
        "features": st.sampled_from(["raw", "unit"]),
        "square": st.booleans(),
        "scale": st.booleans(),
        "diagonal": st.booleans(),
    }
)


@given(st.integers(0, 1000), options)
def test_importance_is_what_sources_give(seed, chosen):
    policy = TopV(**chosen)
    view = make_features(make_visibility([[[1]]], 12), seed=seed, grid=4)
    wanted = slow_importance(policy, view, 0, range(12))
    found = policy.importance(view)[0].tolist()
    assert found == pytest.approx([wanted[column] for column in range(12)], rel=1e-6, abs=1e-9)
    assert sum(found) == pytest.approx(12)


def test_importance_is_not_the_mass_of_the_sources():
    view = make_features(make_visibility([[[1]]], 24), grid=6)
    assert TopV(marginals="uniform").importance(view)[0].std() > 0.01
    assert TopV(marginals="uniform", last="sources").importance(view)[0].std() == 0


def test_the_port_ranks_by_the_length_of_features():
    view = make_features(make_visibility([[[1]]], 24), grid=6)
    lengths = view.features[0].norm(dim=-1)
    found = kvprune.get_policy("topv:preset=port").importance(view)[0]
    assert found.tolist() == pytest.approx((lengths / lengths.mean()).tolist())


def test_images_do_not_draw_from_each_other():
    visibility = make_visibility([[[1, 1]]], 6, images=[0, 1])
    view, policy = make_features(visibility), TopV()
    found = policy.importance(view)[0].tolist()
    for columns in (range(6), range(6, 12)):
        wanted = slow_importance(policy, view, 0, columns)
        assert [found[column] for column in columns] == pytest.approx(list(wanted.values()), rel=1e-6)


def test_the_centre_alone_keeps_a_disc():
    view = make_features(make_visibility([[[1]]], 49), grid=7)
    policy = TopV(alpha=0.0, beta=0.0, gamma=1.0, recover=0.0, keep_tokens=13, marginals="free")
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
        ({"steps": 0}, "steps counts Sinkhorn iterations, at least 1, got 0"),
        ({"marginals": "length"}, r"must be norm \| uniform \| free"),
        ({"last": "rows"}, r"must be targets \| sources"),
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
