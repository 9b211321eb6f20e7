"""Sharing a budget out: exact totals, monotone, against an apportionment that takes one token at a time."""

import math
from fractions import Fraction

import pytest
import torch
from helpers import conversations, make_visibility, slow_groups, slow_strata, visibilities
from hypothesis import given
from hypothesis import strategies as st

from kvprune import scoring
from kvprune.scoring.apportionment import apportion, blended, each, is_clamped, proportional

COLUMNS = 6
anything = conversations() | visibilities()


@st.composite
def claims(draw, max_rows=4):
    """Urgencies that fall along each row, with ties; the least and the most of each row."""
    rows = draw(st.integers(1, max_rows))
    levels = st.lists(st.integers(-3, 3), min_size=COLUMNS, max_size=COLUMNS)
    urgency = [sorted(draw(levels), reverse=True) for _ in range(rows)]
    most = [draw(st.integers(0, COLUMNS)) for _ in range(rows)]
    least = [draw(st.integers(0, cap)) for cap in most]
    return urgency, least, most


def shared(urgency, least, most, total):
    counts = apportion(
        torch.tensor([urgency], dtype=torch.float64),
        torch.tensor([least]),
        torch.tensor([most]),
        torch.tensor([total]),
    )
    assert counts.dtype == torch.int64
    return counts[0].tolist()


def one_at_a_time(urgency, least, most, total):
    """Give each row its least, then token after token to the row whose next one is most urgent."""
    counts = list(least)
    while sum(counts) < min(total, sum(most)):
        open_rows = [row for row in range(len(counts)) if counts[row] < most[row]]
        counts[min(open_rows, key=lambda row: (-urgency[row][counts[row]], counts[row], row))] += 1
    return counts


@given(claims(), st.integers(0, 30))
def test_tokens_go_one_by_one_to_the_row_that_wants_its_next_one_most(drawn, total):
    urgency, least, most = drawn
    assert shared(urgency, least, most, total) == one_at_a_time(urgency, least, most, total)


@given(claims(), st.integers(0, 30))
def test_the_total_is_exact_within_what_there_is(drawn, total):
    urgency, least, most = drawn
    counts = shared(urgency, least, most, total)
    assert sum(counts) == max(sum(least), min(total, sum(most)))
    assert all(low <= count <= high for low, count, high in zip(least, counts, most, strict=True))


@given(claims(), st.integers(0, 30), st.integers(0, 30))
def test_a_larger_total_takes_from_nobody(drawn, one, other):
    small, large = (shared(*drawn, total) for total in sorted([one, other]))
    assert all(few <= many for few, many in zip(small, large, strict=True))


@given(claims(), st.integers(0, COLUMNS), st.integers(0, COLUMNS), st.integers(0, 100))
def test_a_larger_total_takes_from_nobody_if_each_row_is_sure_of_a_part_of_its_even_share(
    drawn, one, other, percent
):
    urgency, _, _ = drawn
    rows = len(urgency)

    def keep(even):
        return shared(urgency, [even * percent // 100] * rows, [COLUMNS] * rows, rows * even)

    small, large = map(keep, sorted([one, other]))
    assert all(few <= many for few, many in zip(small, large, strict=True))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 25))
def test_rows_that_want_the_same_get_the_same_and_the_first_ones_the_rest(rows, levels, total):
    urgency = [[-(place // levels) for place in range(COLUMNS)]] * rows
    counts = shared(urgency, [0] * rows, [COLUMNS] * rows, total)
    even, rest = divmod(min(total, rows * COLUMNS), rows)
    assert counts == [even + 1] * rest + [even] * (rows - rest)


@given(claims(), st.integers(0, 30), st.integers(0, 9))
def test_rounding_does_not_decide_between_rows(drawn, total, seed):
    urgency, least, most = drawn
    noise = torch.rand(len(urgency), COLUMNS, generator=torch.Generator().manual_seed(seed)).double()
    noisy = ((torch.tensor(urgency) + 1 / 3) * (1 + 1e-7 * noise)).tolist()
    assert shared(noisy, least, most, total) == shared(urgency, least, most, total)


def test_rows_that_are_equal_but_for_rounding_share_evenly():
    assert shared([[1 / 3] * 4, [(1 + 1e-9) / 3] * 4], [0, 0], [4, 4], 4) == [2, 2]


def test_the_lowest_number_is_more_urgent_than_what_a_row_does_not_have():
    lowest = torch.finfo(torch.float64).min
    assert shared([[0.0, lowest, 0.0], [lowest, lowest, 0.0]], [0, 0], [2, 1], 3) == [2, 1]


def test_a_token_is_never_more_urgent_than_a_better_one_of_its_row():
    assert shared([[1, 9, 9, 0], [2, 2, 2, 2]], [0, 0], [4, 4], 3) == [0, 3]


def test_samples_are_shared_out_on_their_own():
    urgency = torch.tensor([[[3.0, 1.0], [2.0, 0.0]], [[0.0, 0.0], [5.0, 4.0]]])
    ones = torch.ones(2, 2, dtype=torch.int64)
    counts = apportion(urgency, ones * 0, ones * 2, torch.tensor([3, 2]))
    assert counts.tolist() == [[2, 1], [0, 2]]


# proportional


@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.integers(0, 40))
def test_shares_are_rounded_to_the_nearest_by_one_common_divisor(weights, total):
    """Webster: there is a divisor by which every weight, rounded, is what its row keeps."""
    urgency = proportional(torch.tensor([weights], dtype=torch.float64), 40)
    rows = len(weights)
    counts = shared(urgency[0].tolist(), [0] * rows, [40] * rows, total)
    assert sum(counts) == min(total, 40 * rows)
    if sum(weights) == 0 or total > 40:
        return
    low = max((w / (n + 0.5) for w, n in zip(weights, counts, strict=True)), default=0)
    high = min((w / (n - 0.5) for w, n in zip(weights, counts, strict=True) if n), default=math.inf)
    assert low <= high


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 3))
def test_shares_that_are_whole_numbers_are_met(weights, times):
    urgency = proportional(torch.tensor([weights], dtype=torch.float64), 40)
    rows = len(weights)
    counts = shared(urgency[0].tolist(), [0] * rows, [40] * rows, times * sum(weights))
    assert counts == [times * weight for weight in weights]


def test_rows_without_a_weight_share_evenly():
    urgency = proportional(torch.zeros(1, 3), 4)
    assert shared(urgency[0].tolist(), [0] * 3, [4] * 3, 7) == [3, 2, 2]


@pytest.mark.parametrize(
    ("weights", "least", "total", "clamped"),
    [
        ([1.0, 1.0], 0, 10, False),
        ([3.0, 1.0], 0, 12, False),  # 9 and 3 of 10
        ([3.0, 1.0], 0, 16, True),  # 12 of 10
        ([3.0, 1.0], 0, 20, False),  # all is kept
        ([3.0, 1.0], 2, 4, True),  # 1, but at least 2
        ([3.0, 1.0], 1, 4, False),
        ([0.0, 0.0], 1, 4, False),
        ([0.0, 0.0], 0, 0, False),
    ],
)
def test_shares_that_cannot_be_met_are_noticed(weights, least, total, clamped):
    bounds = torch.tensor([[least, least]]), torch.tensor([[10, 10]])
    assert bool(is_clamped(torch.tensor([weights]), *bounds, torch.tensor([total]))) is clamped


def test_each_computes_with_whole_numbers():
    counts = torch.tensor([[10, 0], [10**17, 3]])
    assert each(lambda count: count * 7 // 5, counts).tolist() == [[14, 0], [14 * 10**16, 4]]


# what stands in kvprune.scoring for it


@given(anything, st.integers(0, 9), st.integers(0, 5))
def test_heads_may_keep_different_numbers(visibility, first, second):
    strata = visibility.strata
    scores = torch.rand(visibility.batch, 2, visibility.columns, generator=torch.Generator().manual_seed(1))
    by_head = torch.tensor([first, second])[None, :, None].expand(*scores.shape)
    kept = scoring.keep_top(scores, strata, by_head, visibility)
    for head, number in enumerate((first, second)):
        limit = torch.full_like(strata, number)
        alone = scoring.keep_top(scores[:, head : head + 1], strata, limit, visibility)
        assert torch.equal(kept[:, head], alone[:, 0])


@given(anything, st.integers(0, 3))
def test_scores_are_listed_in_the_order_in_which_tokens_are_kept(visibility, levels):
    strata = visibility.decode_strata
    scores = torch.rand(visibility.batch, 2, visibility.columns, generator=torch.Generator().manual_seed(1))
    scores = (scores * levels).floor() if levels else scores
    ordered = scoring.in_keeping_order(scores, strata, visibility)
    for number in range(1, visibility.columns + 1):
        limit = torch.full_like(strata, number)
        kept = scoring.keep_top(scores, strata, limit, visibility) & (strata >= 0)[:, None]
        for sample in range(visibility.batch):
            for head in range(2):
                best = scores[sample, head][kept[sample, head]].tolist()
                assert sorted(ordered[sample, head, : len(best)].tolist()) == sorted(best)
                rest = ordered[sample, head, int((strata[sample] >= 0).sum()) :]
                assert (rest == torch.finfo(torch.float32).min).all()


def test_the_best_of_each_image_comes_first():
    visibility = make_visibility([[[1, 1]]], 2, images=[0, 1])
    scores = torch.tensor([[[5.0, 4.0, 1.0, 2.0]]])
    assert scoring.in_keeping_order(scores, visibility.strata, visibility).tolist() == [
        [[5.0, 2.0, 4.0, 1.0]]
    ]


@given(anything)
def test_one_column_of_each_group_is_what_must_stay(visibility):
    strata = visibility.decode_strata
    counts = scoring.group_counts(strata, visibility).tolist()
    for sample in range(visibility.batch):
        counted = slow_strata(visibility, sample)[0]
        groups = sum(bool(group & counted) for group in slow_groups(visibility, sample))
        assert counts[sample] == (max(1, groups) if counted else 0)


@given(claims(), st.sampled_from([0, 0.2, 0.25, 0.5, 0.9, 1]))
def test_a_blended_token_is_due_when_the_rounded_share_of_its_row_first_counts_it(drawn, alpha):
    urgency, _, most = drawn
    rows = range(len(most))
    taken = sorted((-urgency[row][i], i, row) for row in rows for i in range(most[row]))
    hits, due = [0] * len(most), [[] for _ in rows]
    for total in range(1, COLUMNS * len(most) + 1):  # beyond what there is, rows win nothing more
        if total <= len(taken):
            hits[taken[total - 1][2]] += 1
        even = Fraction(str(alpha)) * Fraction(total, len(most))
        for row in rows:
            share = (1 - Fraction(str(alpha))) * hits[row] + even
            due[row] += [total] * (math.floor(share + Fraction(1, 2)) - len(due[row]))
    got = blended(torch.tensor([urgency], dtype=torch.float64), torch.tensor([most]), alpha)[0]
    for row in rows:
        assert (-got[row, : most[row]]).tolist() == due[row][: most[row]]


@pytest.mark.parametrize(
    ("total", "counts"), [(0, [0, 0]), (1, [1, 0]), (4, [3, 1]), (5, [3, 2]), (8, [4, 4])]
)
def test_a_blend_lies_between_what_rows_win_and_an_even_share(total, counts):
    urgency = torch.tensor([[[9.0, 8.0, 7.0, 6.0], [5.0, 4.0, 3.0, 2.0]]])
    most, least = torch.tensor([[4, 4]]), torch.tensor([[0, 0]])
    assert apportion(blended(urgency, most, 0.5), least, most, torch.tensor([total])).tolist() == [counts]
