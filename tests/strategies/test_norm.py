"""`norm` ranks tokens by the length of their values or keys, from either end."""

import dataclasses
import math

import pytest
import torch
from helpers import alone, conversations, exact_budget, kept_sets, make_view, make_visibility, slow_strata
from hypothesis import given
from hypothesis import strategies as st
from kvprune_strategies import Norm

import kvprune
from kvprune.errors import PolicyOptionError

TENSORS = ("values", "keys", "raw_keys")
ratios = st.integers(1, 100).map(lambda percent: percent / 100)


@given(conversations(), st.sampled_from(sorted(TENSORS)), st.sampled_from(["high", "low"]), ratios)
def test_each_head_keeps_the_longest_or_shortest(visibility, of, end, ratio):
    view = make_view(visibility)
    kept = kept_sets(Norm(of=of, keep=end, keep_ratio=ratio).select(view).cache)
    tensor = getattr(view, of)
    sign = -1 if end == "high" else 1
    for sample in range(visibility.batch):
        seen = slow_strata(visibility, sample)[0]
        for head in range(2):
            lengths = [math.hypot(*vector) for vector in tensor[sample, head].tolist()]
            order = sorted(seen, key=lambda column, lengths=lengths: (sign * lengths[column], column))
            assert kept[sample][head] == set(order[: exact_budget(ratio, len(seen))])


def test_the_defaults_are_long_values():
    view = make_view(make_visibility([[[1]]], 12))
    assert kvprune.get_policy("norm") == Norm(of="values", keep="high", keep_ratio=0.5)
    assert Norm().select(view) == Norm(of="values", keep="high").select(view)


def test_the_published_rule_keeps_short_keys():
    assert kvprune.get_policy("norm:preset=published") == Norm(of="keys", keep="low")


def test_the_six_combinations_keep_different_tokens():
    view = make_view(make_visibility([[[1]]], 24))
    found = {
        str(kept_sets(Norm(of=of, keep=end).select(view).cache)) for of in TENSORS for end in ("high", "low")
    }
    assert len(found) == 6


def test_high_and_low_halves_are_complements():
    view = make_view(make_visibility([[[1]]], 24))
    high, low = (kept_sets(Norm(keep=end).select(view).cache)[0] for end in ("high", "low"))
    for head in range(2):
        assert high[head] | low[head] == set(range(24))
        assert not high[head] & low[head]


@pytest.mark.parametrize(("of", "needs"), [("values", set()), ("keys", set()), ("raw_keys", {"raw_keys"})])
def test_raw_keys_are_captured_only_where_they_are_used(of, needs):
    policy = Norm(of=of)
    assert policy.needs == needs
    view = make_view(make_visibility([[[1]]], 6), captured_queries=None, captured_raw_keys=None)
    if needs:
        with pytest.raises(PolicyOptionError, match=r"view\.raw_keys"):
            policy.select(view)
    else:
        assert policy.select(view).cache.counts.tolist() == [[3, 3]]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("norm:of=queries", r"'of' of policy 'norm' must be values \| keys \| raw_keys, got 'queries'"),
        ("norm:keep=most", r"'keep' of policy 'norm' must be high \| low, got 'most'"),
        ("norm:keep=0.5", r"'keep' of policy 'norm' must be high \| low, got '0\.5'"),
        ("norm:keep_ration=0.5", "no option 'keep_ration'; did you mean 'keep_ratio'"),
    ],
)
def test_wrong_options_are_refused_with_what_would_be_right(spec, message):
    with pytest.raises(PolicyOptionError, match=message):
        kvprune.get_policy(spec)


def test_norms_of_half_precision_are_taken_in_float32():
    view = make_view(make_visibility([[[1]]], 8), dtype=torch.float16)
    huge = dataclasses.replace(view, values=torch.full((1, 2, 8, 4), 60000.0, dtype=torch.float16))
    scores = Norm().score(huge)
    assert scores.dtype == torch.float32
    assert bool(scores.isfinite().all())
    assert Norm().score(make_view(make_visibility([[[1]]], 8), dtype=torch.float64)).dtype == torch.float64


@given(conversations(), ratios, st.sampled_from(["layer", "onward"]))
def test_a_sample_keeps_alone_what_it_keeps_in_a_batch(visibility, ratio, reach):
    view, policy = make_view(visibility), Norm(keep_ratio=ratio, reach=reach)
    together = kept_sets(policy.select(view).cache)
    for sample in range(visibility.batch):
        assert kept_sets(policy.select(alone(view, sample)).cache)[0] == together[sample]


@given(conversations(), ratios, ratios, st.sampled_from(["layer", "onward"]))
def test_a_larger_budget_keeps_a_superset(visibility, one, other, reach):
    view = make_view(visibility)
    few, many = (
        Norm(keep_ratio=ratio, reach=reach).select(view).cache.to_mask() for ratio in sorted([one, other])
    )
    assert not bool((few & ~many).any())


def test_first_layers_stay_whole():
    policy = kvprune.get_policy("norm:whole_layers=2,keep_ratio=0.5")
    visibility = make_visibility([[[1]]], 8)
    assert policy.exact_budget is None
    assert policy.requested == {"keep_ratio": 0.5}
    for rank in range(4):
        decision = policy.select(make_view(visibility, rank=rank))
        assert (decision.cache is None) == (rank < 2)


@pytest.mark.parametrize("options", ["whole_layers=-1", "whole_layers=1,reach=onward"])
def test_whole_layers_are_a_number_and_need_decisions_by_layer(options):
    with pytest.raises(PolicyOptionError, match="first layers that keep everything, with reach=layer"):
        kvprune.get_policy(f"norm:{options}")


def test_a_scorer_of_another_policy_spares_no_layers():
    with pytest.raises(PolicyOptionError, match="sets whole_layers, which would be ignored"):
        kvprune.get_policy("adakv:scorer=norm(whole_layers=1)")
