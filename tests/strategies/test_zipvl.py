"""`zipvl` against plain loops, and what the notes on the method promise."""

from __future__ import annotations

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
)
from hypothesis import given, settings
from hypothesis import strategies as st

import kvprune
from kvprune.errors import BudgetError, PolicyOptionError
from kvprune.testing.reference import kept_bits

few = settings(max_examples=40, deadline=None)
taus = st.sampled_from([0.05, 0.3, 0.5, 0.8, 0.96, 0.975, 1.0])


def zipvl(**options):
    return type(kvprune.get_policy("zipvl")).from_options(options)


def bits_of(policy, view, sample=0):
    """Bits of each kept column of one sample."""
    selection = policy.select(view).cache
    assert selection.indices.shape[1] == 1  # heads share tokens
    return dict(kept_bits(selection)[sample][0])


def averages(view, sample):
    """Attention of each column averaged over query heads, and how many rows see it."""
    heads = view.captured.queries.shape[1]
    by_head = [slow_attention(view, sample, head) for head in range(heads)]
    mass = [math.fsum(column) / heads for column in zip(*by_head, strict=True)]
    rows = [seen_by_row(view.visibility, sample, row) for row in live_rows(view.visibility, sample)]
    readers = [sum(column in seen for seen in rows) for column in range(len(mass))]
    return mass, readers


def slow_important(view, sample, tau=None, ratio=None):
    """The important columns of a sample that sees an image."""
    visible = sorted(slow_decode(view.visibility, sample))
    mass, readers = averages(view, sample)
    if ratio is not None:
        count = exact_budget(ratio, len(visible))
    else:
        falling = sorted((mass[column] for column in visible), reverse=True)
        goal = tau * math.fsum(falling)
        count = next(p for p in range(1, len(falling) + 1) if math.fsum(falling[:p]) >= goal - 1e-12)
    order = sorted(visible, key=lambda column: (-mass[column] / readers[column], column))
    first = [
        next(c for c in order if c in group)
        for group in slow_groups(view.visibility, sample)
        if group & set(visible)
    ]
    rest = [column for column in order if column not in first]
    return set(first) | set(rest[: max(0, count - len(first))])


@few
@given(conversations(), taus, st.integers(0, 99))
def test_it_keeps_what_loops_find_important(visibility, tau, seed):
    view = make_view(visibility, seed=seed)
    kept = kept_sets(zipvl(tau=tau).select(view).cache)
    for sample in range(visibility.batch):
        if live_rows(visibility, sample):
            assert kept[sample][0] == slow_important(view, sample, tau)


@few
@given(conversations(), st.sampled_from([0.01, 0.3, 0.5, 1.0]), st.integers(0, 99))
def test_at_an_exact_share_it_keeps_the_best_by_normalised_attention(visibility, ratio, seed):
    view = make_view(visibility, seed=seed)
    kept = kept_sets(zipvl(keep_ratio=ratio).select(view).cache)
    for sample in range(visibility.batch):
        if live_rows(visibility, sample):
            assert kept[sample][0] == slow_important(view, sample, ratio=ratio)


@few
@given(conversations(), taus, st.integers(0, 99))
def test_held_in_few_bits_are_exactly_those_that_would_be_dropped(visibility, tau, seed):
    view = make_view(visibility, seed=seed)
    mixed, dropping = zipvl(tau=tau, high_bits=4, low_bits=2), zipvl(tau=tau)
    for sample in range(visibility.batch):
        if not live_rows(visibility, sample):
            continue
        bits, important = bits_of(mixed, view, sample), set(bits_of(dropping, view, sample))
        visible = slow_decode(visibility, sample)
        assert bits == {column: 4 if column in important else 2 for column in visible}


@few
@given(conversations(), st.integers(0, 99))
def test_the_count_is_the_smallest_that_reaches_tau_and_grows_with_it(visibility, seed):
    view = make_view(visibility, seed=seed)
    before = [set() for _ in range(visibility.batch)]
    for tau in (0.05, 0.3, 0.5, 0.8, 0.96, 0.975, 1.0):
        kept = kept_sets(zipvl(tau=tau).select(view).cache)
        for sample in range(visibility.batch):
            assert before[sample] <= kept[sample][0]
            before[sample] = kept[sample][0]
    for sample in range(visibility.batch):
        if live_rows(visibility, sample):  # random attention is nowhere zero
            assert before[sample] == slow_decode(visibility, sample)


def slow_separate(view, sample, tau):
    """The important columns of each KV head of a sample that sees an image, by its own attention."""
    visible = sorted(slow_decode(view.visibility, sample))
    _, readers = averages(view, sample)
    group = view.captured.queries.shape[1] // view.keys.shape[1]
    found = []
    for kv_head in range(view.keys.shape[1]):
        by_head = [slow_attention(view, sample, kv_head * group + head) for head in range(group)]
        mass = [math.fsum(column) / group for column in zip(*by_head, strict=True)]
        falling = sorted((mass[column] for column in visible), reverse=True)
        goal = tau * math.fsum(falling) - 1e-12
        count = next(p for p in range(1, len(falling) + 1) if math.fsum(falling[:p]) >= goal)
        order = sorted(visible, key=lambda column, m=mass: (-m[column] / readers[column], column))
        groups = [group & set(visible) for group in slow_groups(view.visibility, sample)]
        first = [next(c for c in order if c in group) for group in groups if group]
        rest = [column for column in order if column not in first]
        found.append(set(first) | set(rest[: max(0, count - len(first))]))
    return found


@few
@given(conversations(), taus, st.integers(0, 99))
def test_separate_heads_find_their_own_tokens_and_numbers(visibility, tau, seed):
    view = make_view(visibility, seed=seed)
    kept = kept_sets(zipvl(tau=tau, heads="separate").select(view).cache)
    for sample in range(visibility.batch):
        if live_rows(visibility, sample):
            assert kept[sample] == slow_separate(view, sample, tau)


def test_separate_heads_hold_their_own_tokens_in_more_bits():
    view = make_view(make_visibility([[[1]] * 3], 10))
    mixed = kvprune.get_policy("zipvl:preset=zipcache,high_ratio=0.3").select(view).cache
    dropping = zipvl(keep_ratio=0.3, heads="separate").select(view).cache
    assert dropping.counts.tolist() == [[3, 3]]
    assert mixed.counts.tolist() == [[10, 10]]
    assert torch.equal(mixed.bits == 4, dropping.to_mask())
    assert set(mixed.bits.flatten().tolist()) == {2, 4}


def test_flat_attention_keeps_tau_of_the_tokens_and_peaked_attention_one():
    visibility = make_visibility([[[1]] * 3], 40)
    flat = make_view(visibility, captured_queries=torch.zeros(1, 4, 3, 4, dtype=torch.float64))
    for tau in (0.1, 0.25, 0.5, 0.96, 0.975, 1.0):
        for dtype in (torch.float64, torch.float32):
            view = make_view(visibility, dtype=dtype, captured_queries=flat.captured.queries.to(dtype))
            assert len(bits_of(zipvl(tau=tau), view)) == exact_budget(tau, 40)
    keys = torch.zeros(1, 2, 40, 4, dtype=torch.float64)
    keys[:, :, 7] = 1e4
    peaked = make_view(visibility, keys=keys, captured_queries=torch.ones(1, 4, 3, 4, dtype=torch.float64))
    for tau in (0.1, 0.975, 1.0):
        assert set(bits_of(zipvl(tau=tau), peaked)) == {7}


def test_equal_scores_go_by_position():
    view = make_view(
        make_visibility([[[1]]], 8), captured_queries=torch.zeros(1, 4, 1, 4, dtype=torch.float64)
    )
    assert set(bits_of(zipvl(tau=0.5), view)) == {0, 1, 2, 3}


def test_a_token_that_few_rows_see_is_judged_by_those_rows():
    """Two images, the second seen by the last of four rows only: attention per row decides who stays."""
    visibility = make_visibility([[[1, 0]] * 3 + [[1, 1]]], 4, images=[0, 1])
    queries, keys = torch.zeros(1, 4, 4, 4).double(), torch.zeros(1, 2, 8, 4).double()
    queries[:, :, 3], keys[:, :, 4:] = 1.0, 100.0
    view = make_view(visibility, captured_queries=queries, keys=keys)
    # Columns 0 to 3 get 1/4 from three of four rows; columns 4 to 7 get 1/4 from the only row that sees them.
    assert set(bits_of(zipvl(keep_ratio=0.5), view)) == {0, 4, 5, 6}  # 0 for its image
    # 3 of the attention and 1: the count goes by the sums.
    assert len(bits_of(zipvl(tau=0.75), view)) == 4
    assert len(bits_of(zipvl(tau=0.76), view)) == 5


@few
@given(conversations(), st.integers(0, 99))
def test_reading_as_many_rows_as_there_are_is_exact(visibility, seed):
    view = make_view(visibility, seed=seed)
    rows = visibility.live.shape[1]
    exact = zipvl(tau=0.8).select(view).cache
    assert zipvl(tau=0.8, recent=1, probe=rows).select(view).cache == exact
    assert zipvl(tau=0.8, recent=rows, probe=0).select(view).cache == exact


@few
@given(conversations(), st.integers(0, 99), st.integers(1, 2), st.integers(0, 2))
def test_a_sample_reads_the_same_rows_alone(visibility, seed, recent, probe):
    view = make_view(visibility, seed=seed)
    policy = zipvl(tau=0.7, recent=recent, probe=probe)
    together = policy._rows(view)
    for sample in range(visibility.batch):
        found = policy._rows(alone(view, sample))[0]
        assert torch.equal(found, together[sample])
        live = live_rows(visibility, sample)
        read = found.nonzero()[:, 0].tolist()
        assert set(live[-recent:]) <= set(read) <= set(live)
        assert len(read) == min(len(live), recent + probe)


def test_drawn_rows_differ_by_seed_layer_and_sample():
    visibility = make_visibility([[[1]] * 40] * 2, 4)
    first, policy = make_view(visibility), zipvl(recent=1, probe=5)
    views = [first, make_view(visibility, rank=1), dataclasses.replace(first, seed=1)]
    drawn = [tuple(map(tuple, policy._rows(view).tolist())) for view in views]
    assert len({rows for one in drawn for rows in one}) == 6
    assert all(sum(rows) == 6 for one in drawn for rows in one)


def test_a_sample_without_an_image_keeps_all():
    view = make_view(make_visibility([[[1]], [[0]]], 5))
    assert set(bits_of(zipvl(tau=0.3), view, 1)) == set(range(5))


def test_what_it_asks_for_is_on_the_receipt():
    assert zipvl().requested == {"tau": 0.975}
    assert zipvl().exact_budget is None
    assert zipvl(keep_tokens=3).requested == {"keep_tokens": 3}
    assert zipvl(keep_tokens=3).exact_budget == kvprune.Budget(keep_tokens=3)
    assert zipvl(keep_ratio=0.25).requested == {"keep_ratio": 0.25}
    assert zipvl(keep_ratio=0.25).exact_budget == kvprune.Budget(keep_ratio=0.25)
    mixed = zipvl(high_ratio=0.25, low_bits=4)
    assert mixed.requested == {"high_ratio": 0.25}
    assert mixed.exact_budget is None  # all visible tokens are kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.0}, r"share of attention in \(0, 1\], got 0.0"),
        ({"tau": 1.01}, r"share of attention in \(0, 1\], got 1.01"),
        ({"tau": math.nan}, "must be number, got nan"),
        ({"recent": 0}, r"at least 1 recent row .* got recent=0"),
        ({"probe": -1}, r"at least 0 others, got recent=64 and probe=-1"),
        ({"high_bits": 4, "low_bits": 4}, "fewer bits .* high_bits=4 and low_bits=4"),
        ({"high_bits": 4, "low_bits": 8}, "fewer bits .* high_bits=4 and low_bits=8"),
        ({"high_bits": 3}, "16"),
        ({"low_bits": 16}, "0"),
        ({"keep_ratio": 0.5, "low_bits": 2}, r"takes high_ratio .*held \(low_bits=2\), got keep_ratio=0.5"),
        ({"keep_tokens": 3, "low_bits": 2}, r"takes high_ratio .*held \(low_bits=2\), got keep_tokens=3"),
        ({"high_ratio": 0.5}, r"takes keep_ratio .*dropped \(low_bits=0\), got high_ratio=0.5"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(PolicyOptionError, match=message):
        zipvl(**options)


@pytest.mark.parametrize(
    "options", [{"keep_ratio": 0.0}, {"keep_ratio": 1.5}, {"high_ratio": 2.0, "low_bits": 2}]
)
def test_impossible_shares_are_refused(options):
    with pytest.raises(BudgetError):
        zipvl(**options)
