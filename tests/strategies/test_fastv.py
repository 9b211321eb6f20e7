"""`fastv`: K whole layers, then what the last row (or all rows) of the K-th looked at."""

import dataclasses
import math

import pytest
import torch
from generation import generate, mllama
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
)
from hypothesis import given
from hypothesis import strategies as st
from kvprune_strategies import FastV

import kvprune
from kvprune import Decision
from kvprune.errors import BudgetError, PolicyOptionError
from kvprune.testing import mllama_inputs

ratios = st.integers(1, 100).map(lambda percent: percent / 100)
modes = st.sampled_from(["last", "mean"])


def onward(view, **options):
    return [heads[0] for heads in kept_sets(FastV(**options).select(view).onward)]


@given(conversations(), ratios, modes, st.integers(0, 3))
def test_the_highest_attention_of_the_last_row_or_of_all_rows_goes_on(visibility, ratio, rows, seed):
    view = make_view(visibility, seed=seed)
    for sample, kept in enumerate(onward(view, keep_ratio=ratio, rows=rows)):
        expected = set()
        for stratum in slow_strata(visibility, sample):
            voters = [
                r for r in live_rows(visibility, sample) if seen_by_row(visibility, sample, r) & stratum
            ]
            voters = voters[-1:] if rows == "last" else voters
            counted = [[False] * visibility.live.shape[1] for _ in range(visibility.batch)]
            for row in voters:
                counted[sample][row] = True
            heads = [slow_attention(view, sample, head, counted) for head in range(4)]
            order = sorted(stratum, key=lambda c, heads=heads: (-math.fsum(h[c] for h in heads), c))
            expected |= set(order[: exact_budget(ratio, len(stratum))])
        assert kept == expected


@given(st.integers(2, 5), st.integers(0, 5))
def test_only_the_last_usable_row_counts(rows, seed):
    live = [[True] * (rows - 1) + [False]]
    view = make_view(make_visibility([[[1]] * rows], 12, live=live), seed=seed)
    queries = view.queries.clone()
    queries[:, :, : rows - 2] += 3
    queries[:, :, rows - 1] += 3
    assert onward(view.capturing(queries=queries)) == onward(view)
    queries[:, :, rows - 2] *= -5
    assert onward(view.capturing(queries=queries)) != onward(view)


def test_it_decides_in_the_layer_before_the_first_pruned_one_and_leaves_that_whole():
    for rank in (1, 2):
        for layer in range(3):
            view = make_view(make_visibility([[[1]]], 8), rank=layer)
            decision = FastV(rank=rank).select(view)
            assert decision.cache is None
            assert (decision.onward is not None) == (layer == rank - 1)
            if layer != rank - 1:
                assert decision == Decision()


@pytest.mark.parametrize(("rank", "kept"), [(1, [10, 3, 3]), (2, [10, 10, 3])])
def test_in_a_model_the_first_layers_stay_whole_and_no_false_warning_is_given(rank, kept):
    # Two tiles of five columns; decoding sees both.
    with kvprune.compress(mllama(), f"fastv:keep_ratio=0.3,rank={rank}") as run:
        generate(mllama(), mllama_inputs(["t2tt"]), steps=2)
    assert [run.selections[layer].counts.max().item() for layer in (1, 3, 5)] == kept
    assert run.report.warnings == ()


@pytest.mark.parametrize("rank", [3, 9])
def test_a_rank_after_which_no_layer_comes_is_refused_at_the_first_layer(rank):
    view = make_view(make_visibility([[[1]]], 8))
    with pytest.raises(PolicyOptionError, match=rf"rank={rank} .*has 3, so nothing would be pruned"):
        FastV(rank=rank).select(view)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("fastv:rank=0", PolicyOptionError, "at least 1, got 0"),
        ("fastv:rank=-2", PolicyOptionError, "at least 1, got -2"),
        ("fastv:rows=first", PolicyOptionError, r"must be last \| mean, got 'first'"),
        ("fastv:keep_ratio=0", BudgetError, r"got 0\.0"),
        ("fastv:keep_ratio=0.5,keep_tokens=3", BudgetError, "neither|either"),
    ],
)
def test_wrong_options_are_refused(spec, error, message):
    with pytest.raises(error, match=message):
        kvprune.get_policy(spec)


def test_half_is_kept_after_the_first_layer_by_default():
    assert kvprune.get_policy("fastv") == FastV(keep_ratio=0.5, rank=1, rows="last")
    assert FastV().requested == {"keep_ratio": 0.5}
    assert FastV(keep_tokens=4).requested == {"keep_tokens": 4}
    assert FastV().exact_budget is None
    (kept,) = onward(make_view(make_visibility([[[1]]], 8)), keep_tokens=3)
    assert len(kept) == 3


def test_equal_scores_keep_the_first_tokens():
    view = make_view(make_visibility([[[1]] * 2], 6))
    equal = dataclasses.replace(view, keys=torch.ones_like(view.keys))
    assert onward(equal) == [{0, 1, 2}]


@given(conversations(), ratios, modes)
def test_a_sample_keeps_alone_what_it_keeps_in_a_batch(visibility, ratio, rows):
    view = make_view(visibility)
    together = onward(view, keep_ratio=ratio, rows=rows)
    for sample in range(visibility.batch):
        assert onward(alone(view, sample), keep_ratio=ratio, rows=rows) == [together[sample]]


@given(conversations(), ratios, ratios, modes)
def test_a_larger_budget_keeps_a_superset(visibility, one, other, rows):
    few, many = (onward(make_view(visibility), keep_ratio=ratio, rows=rows) for ratio in sorted([one, other]))
    assert all(small <= large for small, large in zip(few, many, strict=True))
