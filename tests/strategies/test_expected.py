"""`expected`: what normally distributed queries would attend to, times the norm of values."""

import math
import statistics

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
from kvprune_strategies import Expected

import kvprune
from kvprune.errors import PolicyOptionError

ratios = st.integers(1, 100).map(lambda percent: percent / 100)
anything = st.one_of(visibilities(), conversations())


def slow_scores(view, sample, kv_head, covariance=True, value_norm=True, epsilon=0.0, sinks=0):
    """Scores by column, from the mean and variance of single logits: no covariance matrix is needed."""
    see, scores = view.visibility, [0.0] * view.columns
    for stratum in slow_strata(see, sample):
        rows = [row for row in live_rows(see, sample) if seen_by_row(see, sample, row) & stratum]
        rows = rows[sinks:] or rows
        columns = sorted(stratum)[sinks:]
        if not rows or not columns:
            continue
        for head in (2 * kv_head, 2 * kv_head + 1):
            expected = {}
            for column in columns:
                key = view.keys[sample, kv_head, column].tolist()
                logits = [
                    view.scaling
                    * math.fsum(
                        q * k for q, k in zip(view.queries[sample, head, row].tolist(), key, strict=True)
                    )
                    for row in rows
                ]
                variance = statistics.pvariance(logits) if covariance else 0
                expected[column] = statistics.fmean(logits) + variance / 2
            highest = max(expected.values())
            total = math.fsum(math.exp(logit - highest) for logit in expected.values())
            for column in columns:
                scores[column] += math.exp(expected[column] - highest) / total / 2
        if value_norm:
            for column in columns:
                length = math.hypot(*view.values[sample, kv_head, column].tolist())
                scores[column] = (scores[column] + epsilon) * length
    return scores


@given(
    anything,
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 0.01, 2.0]),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_scores_are_those_of_single_logits(visibility, covariance, value_norm, epsilon, sinks, seed):
    view = make_view(visibility, seed=seed)
    options = {"covariance": covariance, "value_norm": value_norm, "epsilon": epsilon, "sinks": sinks}
    expected = [
        [slow_scores(view, sample, head, **options) for head in range(2)]
        for sample in range(visibility.batch)
    ]
    expected = torch.tensor(expected, dtype=torch.float64)
    scores = Expected(**options).score(view)
    for sample in range(visibility.batch):
        for stratum in slow_strata(visibility, sample):  # the first tokens of each rank above all others
            scores[sample][:, sorted(stratum)[:sinks]] = 0
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-12)


@given(conversations(), ratios, st.integers(0, 4))
def test_each_head_keeps_the_first_tokens_and_then_the_best(visibility, ratio, sinks):
    view = make_view(visibility)
    kept = kept_sets(Expected(keep_ratio=ratio, sinks=sinks).select(view).cache)
    for sample in range(visibility.batch):
        seen = slow_strata(visibility, sample)[0]
        first = sorted(seen)[:sinks]
        for head in range(2):
            scores = slow_scores(view, sample, head, sinks=sinks)
            order = first + sorted(
                seen - set(first), key=lambda column, scores=scores: (-scores[column], column)
            )
            assert kept[sample][head] == set(order[: exact_budget(ratio, len(seen))])


def test_one_row_expects_its_own_attention():
    view = make_view(make_visibility([[[1]]], 9))
    scores = Expected(value_norm=False).score(view)
    for kv_head in range(2):
        heads = [slow_attention(view, 0, head) for head in (2 * kv_head, 2 * kv_head + 1)]
        mean = torch.tensor(heads, dtype=torch.float64).mean(0)
        torch.testing.assert_close(scores[0, kv_head], mean)


def test_the_average_of_many_normal_queries_comes_near():
    """The formula is that of the mean of exp(logit): many drawn queries find the same ratios."""
    rows = 20000
    view = make_view(make_visibility([[[1]] * rows], 5))
    logits = view.scaling * torch.einsum("htd,hsd->hts", view.queries[0, ::2], view.keys[0])
    drawn = logits.exp().mean(1)  # [Hkv, S]
    drawn = drawn / drawn.sum(-1, keepdim=True)
    single = view.capturing(queries=view.queries[:, ::2])  # a query head per KV head
    torch.testing.assert_close(Expected(value_norm=False).score(single)[0], drawn, rtol=0.1, atol=0.01)


def test_queries_of_dead_rows_do_not_count():
    view = make_view(make_visibility([[[1]] * 3], 6, live=[[True, False, True]]))
    queries = view.queries.clone()
    queries[:, :, 1] = torch.nan
    torch.testing.assert_close(
        Expected().score(view.capturing(queries=queries)), Expected().score(view), rtol=0, atol=0
    )


def test_options_and_needs():
    assert kvprune.get_policy("expected") == Expected(keep_ratio=0.5)
    assert kvprune.get_policy("expected:preset=kvpress") == Expected(sinks=4)
    assert kvprune.get_policy("expected:preset=published") == Expected(sinks=4, epsilon=0.01)
    assert Expected().needs == {"queries"}
    kvprune.get_policy("adakv:scorer=expected(preset=published)")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("sinks=-1", "sinks of policy 'expected' is a number of first tokens, 0 or more, got -1"),
        ("epsilon=-0.1", r"epsilon of policy 'expected' is added to attention, 0 or more, got -0\.1"),
        ("covariance=some", "must be true or false, got 'some'"),
    ],
)
def test_wrong_options_are_refused_with_what_would_be_right(options, message):
    with pytest.raises(PolicyOptionError, match=message):
        kvprune.get_policy(f"expected:{options}")


@given(conversations(), ratios, st.sampled_from(["layer", "onward"]), st.integers(0, 3))
def test_a_sample_keeps_alone_what_it_keeps_in_a_batch(visibility, ratio, reach, sinks):
    view, policy = make_view(visibility), Expected(keep_ratio=ratio, reach=reach, sinks=sinks)
    together = kept_sets(policy.select(view).cache)
    for sample in range(visibility.batch):
        assert kept_sets(policy.select(alone(view, sample)).cache)[0] == together[sample]
