"""`vatp`: attention times the L1 norm of values, head by head."""

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
from kvprune_strategies import H2O, VATP

import kvprune
from kvprune.errors import PolicyOptionError

ratios = st.integers(1, 100).map(lambda percent: percent / 100)
anything = st.one_of(visibilities(), conversations())


def slow_scores(view, sample, kv_head, normalize):
    see = view.visibility
    heads = [slow_attention(view, sample, head) for head in (2 * kv_head, 2 * kv_head + 1)]
    seen = [seen_by_row(see, sample, row) for row in live_rows(see, sample)]
    scores = []
    for column, value in enumerate(view.values[sample, kv_head].tolist()):
        attention = math.fsum(head[column] for head in heads) / 2
        if normalize:
            attention /= max(1, sum(column in row for row in seen))
        scores.append(attention * math.fsum(abs(entry) for entry in value))
    return scores


@given(anything, st.booleans(), st.integers(0, 3))
def test_scores_are_attention_times_the_sum_of_absolute_entries(visibility, normalize, seed):
    view = make_view(visibility, seed=seed)
    expected = [
        [slow_scores(view, sample, head, normalize) for head in range(2)]
        for sample in range(visibility.batch)
    ]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(VATP(normalize=normalize).score(view), expected, rtol=1e-10, atol=1e-12)


@given(conversations(), ratios, st.integers(0, 4))
def test_each_head_keeps_the_first_tokens_and_then_the_best(visibility, ratio, sinks):
    view = make_view(visibility)
    kept = kept_sets(VATP(keep_ratio=ratio, sinks=sinks).select(view).cache)
    for sample in range(visibility.batch):
        seen = slow_strata(visibility, sample)[0]
        first = sorted(seen)[:sinks]
        for head in range(2):
            scores = slow_scores(view, sample, head, normalize=True)
            order = first + sorted(
                seen - set(first), key=lambda column, scores=scores: (-scores[column], column)
            )
            assert kept[sample][head] == set(order[: exact_budget(ratio, len(seen))])


@pytest.mark.parametrize("reach", ["layer", "onward"])
def test_the_first_tokens_of_each_image_are_protected_where_images_are_counted_apart(reach):
    visibility = make_visibility([[[1, 0], [1, 0], [0, 1]]], 6, images=[0, 1])  # the last row sees the second
    decision = VATP(sinks=2, keep_tokens=3, reach=reach).select(make_view(visibility))
    (kept,) = kept_sets(decision.cache)[0][:1]
    assert {6, 7} <= kept
    if reach == "onward":
        assert {0, 1, 6, 7} <= kept_sets(decision.onward)[0][0]


def test_values_of_one_length_rank_as_attention_does():
    view = make_view(make_visibility([[[1]] * 3], 12))
    even = dataclasses.replace(view, values=view.values.sign())
    assert VATP().select(even) == H2O().select(even)
    assert VATP().select(view) != H2O().select(view)


def test_a_token_without_a_value_goes_first():
    view = make_view(make_visibility([[[1]] * 3], 8))
    heaviest = int(H2O().score(view)[0, 0].argmax())
    values = view.values.clone()
    values[:, :, heaviest] = 0
    silent = dataclasses.replace(view, values=values)
    assert heaviest not in kept_sets(VATP(keep_tokens=7).select(silent).cache)[0][0]


def test_what_nobody_sees_may_hold_infinite_values():
    view = make_view(make_visibility([[[1, 0]]], 4))
    values = view.values.clone()
    values[:, :, 4:] = torch.inf
    scores = VATP(normalize=False).score(dataclasses.replace(view, values=values))
    assert bool((scores[..., 4:] == 0).all())


def test_options_and_needs():
    assert kvprune.get_policy("vatp") == VATP(keep_ratio=0.5, normalize=True, sinks=0)
    assert kvprune.get_policy("vatp:preset=published") == VATP(normalize=False, sinks=20)
    assert VATP().needs == {"queries"}
    with pytest.raises(
        PolicyOptionError, match=r"sinks of policy 'vatp' is a number of first tokens.* got -1"
    ):
        kvprune.get_policy("vatp:sinks=-1")
    with pytest.raises(PolicyOptionError, match="must be true or false, got 'maybe'"):
        kvprune.get_policy("vatp:normalize=maybe")


@given(conversations(), ratios, st.sampled_from(["layer", "onward"]), st.integers(0, 3))
def test_a_sample_keeps_alone_what_it_keeps_in_a_batch(visibility, ratio, reach, sinks):
    view, policy = make_view(visibility), VATP(keep_ratio=ratio, reach=reach, sinks=sinks)
    together = kept_sets(policy.select(view).cache)
    for sample in range(visibility.batch):
        assert kept_sets(policy.select(alone(view, sample)).cache)[0] == together[sample]
