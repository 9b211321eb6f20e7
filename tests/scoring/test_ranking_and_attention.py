"""Attention mass against plain loops; ranks, limits and keeping the top against their definitions."""

import dataclasses
import math

import pytest
import torch
from helpers import (
    conversations,
    exact_budget,
    live_rows,
    make_view,
    make_visibility,
    seen_by_row,
    slow_attention,
    slow_decode,
    slow_groups,
    slow_strata,
    visibilities,
)
from hypothesis import given
from hypothesis import strategies as st

from kvprune import Budget, scoring

anything = st.one_of(visibilities(), visibilities(broadcast=True), conversations())


def mass_of(view, rows=None):
    return scoring.attention_mass(view.queries, view.keys, view.visibility, view.scaling, rows)


def slow_mass(view, counted=None):
    heads = view.captured.queries.shape[1]
    samples = range(view.visibility.batch)
    return torch.tensor(
        [[slow_attention(view, sample, head, counted) for head in range(heads)] for sample in samples],
        dtype=torch.float64,
    )


# attention_mass


@given(anything, st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 1), (6, 3)]), st.integers(0, 5))
def test_attention_mass_is_the_softmax_summed_over_live_rows(visibility, heads, seed):
    view = make_view(visibility, query_heads=heads[0], kv_heads=heads[1], seed=seed)
    torch.testing.assert_close(mass_of(view), slow_mass(view), rtol=1e-10, atol=1e-12)


@given(anything)
def test_attention_mass_adds_up_to_the_number_of_live_rows(visibility):
    view = make_view(visibility, dtype=torch.float32)
    live = visibility.live.sum(-1).float()[:, None].expand(-1, 4)
    torch.testing.assert_close(mass_of(view).sum(-1), live, rtol=1e-5, atol=1e-6)


@given(anything)
def test_columns_that_no_live_row_sees_receive_nothing(visibility):
    hidden = ~visibility.prefill[:, None].expand(-1, 4, -1)
    assert float(mass_of(make_view(visibility))[hidden].abs().sum()) == 0


@given(anything, st.data())
def test_rows_restrict_what_is_added_up_and_never_revive_dead_rows(visibility, data):
    count = visibility.live.numel()
    flags = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    rows = torch.tensor(flags).reshape(visibility.live.shape)
    view = make_view(visibility)
    mass = mass_of(view, rows)
    torch.testing.assert_close(mass, slow_mass(view, rows.tolist()), rtol=1e-10, atol=1e-12)
    rest = mass_of(view, ~rows)
    torch.testing.assert_close(mass + rest, mass_of(view), rtol=1e-10, atol=1e-12)
    assert torch.equal(view.attention_mass(rows), mass)


@pytest.mark.parametrize("text_rows", [63, 64, 65, 129])
def test_attention_mass_does_not_depend_on_the_chunks_of_rows(text_rows):
    rows = [[[1, 0]] * text_rows, [[int(row > 3), int(row % 3 > 0)] for row in range(text_rows)]]
    view = make_view(make_visibility(rows, 3), kv_heads=2, query_heads=4, width=3)
    torch.testing.assert_close(mass_of(view), slow_mass(view), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows_per_chunk", [1, 2, 3, 7])
@pytest.mark.parametrize("elements", [1, 40, 100])
def test_attention_mass_does_not_depend_on_the_size_of_chunks(monkeypatch, rows_per_chunk, elements):
    visibility = make_visibility([[[1, 0, 1]] * 7, [[0, 0, 0]] * 3 + [[1, 1, 0]] * 4], 2)
    view = make_view(visibility, query_heads=6, kv_heads=3)
    monkeypatch.setattr("kvprune.scoring.attention._ROWS_PER_CHUNK", rows_per_chunk)
    monkeypatch.setattr("kvprune.scoring.attention._ELEMENTS_PER_CHUNK", elements)
    torch.testing.assert_close(mass_of(view), slow_mass(view), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "scored_in"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_is_scored_in_float32_and_float64_stays(dtype, scored_in):
    view = make_view(make_visibility([[[1, 1]] * 9, [[1, 0]] * 9], 5), dtype=dtype)
    mass = mass_of(view)
    assert mass.dtype == scored_in
    wide = scoring.attention_mass(
        view.queries.to(scored_in), view.keys.to(scored_in), view.visibility, view.scaling
    )
    assert torch.equal(mass, wide)


def test_large_logits_neither_overflow_nor_become_nan():
    view = make_view(make_visibility([[[1, 1]] * 3], 4), dtype=torch.float32, scaling=1e4)
    mass = mass_of(view)
    assert bool(mass.isfinite().all())
    torch.testing.assert_close(mass.sum(-1), torch.full((1, 4), 3.0))


def test_left_padding_of_a_batch_does_not_change_a_sample():
    rows = [[1, 0], [1, 1], [0, 1]]
    padded = make_visibility([[[0, 0], [0, 0], *rows]], 3)
    wide = make_view(padded, dtype=torch.float32)
    narrow = make_view(
        make_visibility([rows], 3),
        keys=wide.keys,
        values=wide.values,
        captured_queries=wide.captured.queries[:, :, 2:],
    )
    assert torch.equal(mass_of(wide), mass_of(narrow))


def test_attention_mass_leaves_its_inputs_alone():
    view = make_view(make_visibility([[[1, 0], [1, 1]]], 3))
    before = [view.queries.clone(), view.keys.clone(), view.live.clone()]
    mass_of(view)
    assert all(
        torch.equal(was, now) for was, now in zip(before, [view.queries, view.keys, view.live], strict=True)
    )


def test_a_live_row_that_sees_none_of_these_columns_adds_nothing():
    # The first row sees an earlier image only, whose columns are not part of this view.
    visibility = make_visibility([[[1, 0], [0, 1]]], 2, images=[0, 1]).from_column(2)
    mass = mass_of(make_view(visibility))
    torch.testing.assert_close(mass.sum(-1), torch.ones(1, 4, dtype=torch.float64))


# rank_within


@st.composite
def scored_strata(draw):
    batch, heads, columns = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 12))

    def whole(low, high, *shape):
        count = math.prod(shape)
        return torch.tensor(draw(st.lists(st.integers(low, high), min_size=count, max_size=count))).reshape(
            shape
        )

    # Few distinct values, so that ties are common.
    return (
        whole(-2, 2, batch, heads, columns).to(draw(st.sampled_from([torch.float32, torch.float64]))),
        whole(-1, draw(st.integers(0, 3)), batch, columns),
        whole(0, 1, batch, heads, columns).bool(),
    )


@given(scored_strata(), st.booleans())
def test_rank_is_the_place_within_the_stratum_with_ties_by_position(drawn, use_first):
    scores, strata, first = drawn
    ranks = scoring.rank_within(scores, strata, first if use_first else None)
    assert ranks.dtype == torch.int64
    for sample, labels in enumerate(strata.tolist()):
        for head in range(scores.shape[1]):
            for stratum in set(labels):
                members = [column for column, label in enumerate(labels) if label == stratum]

                def key(column, sample=sample, head=head):
                    ahead = use_first and bool(first[sample, head, column])
                    return (not ahead, -float(scores[sample, head, column]), column)

                members.sort(key=key)
                assert ranks[sample, head, members].tolist() == list(range(len(members)))


def test_infinite_scores_rank_at_the_ends():
    scores = torch.tensor([[[0.0, math.inf, -math.inf, 3.0]]])
    assert scoring.rank_within(scores, torch.zeros(1, 4, dtype=torch.int64)).tolist() == [[[2, 0, 3, 1]]]


# stratum_sizes and limits


@given(scored_strata(), st.booleans())
def test_stratum_sizes_count_columns(drawn, restrict):
    _, strata, flags = drawn
    counted = flags[:, 0] if restrict else None
    sizes = scoring.stratum_sizes(strata, counted)
    for sample, labels in enumerate(strata.tolist()):
        for column, label in enumerate(labels):
            members = [
                other
                for other, stratum in enumerate(labels)
                if stratum == label and (counted is None or counted[sample, other])
            ]
            assert int(sizes[sample, column]) == (0 if label < 0 else len(members))


@given(scored_strata(), st.integers(1, 1000))
def test_limits_resolve_the_budget_for_each_stratum_exactly(drawn, thousandths):
    _, strata, _ = drawn
    limit = scoring.limits(Budget(keep_ratio=thousandths / 1000), strata)
    assert limit.dtype == torch.int64
    for sample, labels in enumerate(strata.tolist()):
        for column, label in enumerate(labels):
            expected = 0 if label < 0 else exact_budget(thousandths / 1000, labels.count(label))
            assert int(limit[sample, column]) == expected


@pytest.mark.parametrize(("ratio", "size"), [(0.1, 10), (0.7, 10), (0.3, 1000), (0.07, 100), (0.29, 100)])
def test_limits_are_not_off_by_one_where_floats_would_be(ratio, size):
    limit = scoring.limits(Budget(keep_ratio=ratio), torch.zeros(1, size, dtype=torch.int64))
    assert limit.unique().tolist() == [round(ratio * size)]


@given(scored_strata(), st.integers(1, 15))
def test_limits_of_a_number_of_tokens_stop_at_the_size(drawn, tokens):
    _, strata, _ = drawn
    limit = scoring.limits(Budget(keep_tokens=tokens), strata)
    expected = scoring.stratum_sizes(strata).clamp(max=tokens)
    assert torch.equal(limit, expected)


# keep_top


def top_of(visibility, budget, seed=0, heads=2, levels=None):
    generator = torch.Generator().manual_seed(seed)
    shape = (visibility.batch, heads, visibility.columns)
    scores = torch.rand(shape, generator=generator)
    if levels:
        scores = (scores * levels).floor()
    strata = visibility.strata
    return scores, scoring.keep_top(scores, strata, scoring.limits(budget, strata), visibility)


def slow_top(visibility, sample, scores, budget):
    """The best of each group first, then by score, as many as the budget says; ties by position."""
    kept = set()
    for stratum in slow_strata(visibility, sample):
        order = sorted(stratum, key=lambda column: (-scores[column], column))
        groups = [group & stratum for group in slow_groups(visibility, sample) if group & stratum]
        firsts = {next(column for column in order if column in group) for group in groups}
        rest = [column for column in order if column not in firsts]
        kept |= firsts | set(rest[: max(0, budget.resolve(len(stratum)) - len(firsts))])
    return kept


@given(anything, st.integers(1, 100), st.integers(0, 3), st.sampled_from([None, 3]))
def test_keep_top_keeps_the_best_of_each_group_and_then_the_best(visibility, percent, seed, levels):
    budget = Budget(keep_ratio=percent / 100)
    scores, kept = top_of(visibility, budget, seed, levels=levels)
    for sample in range(visibility.batch):
        for head in range(2):
            expected = slow_top(visibility, sample, scores[sample, head].tolist(), budget)
            assert set(kept[sample, head].nonzero().flatten().tolist()) == expected


@given(anything, st.integers(1, 100))
def test_keep_top_keeps_exactly_the_budget_or_one_of_each_group(visibility, percent):
    _, kept = top_of(visibility, Budget(keep_ratio=percent / 100))
    for sample in range(visibility.batch):
        for stratum in slow_strata(visibility, sample):
            groups = [group for group in slow_groups(visibility, sample) if group & stratum]
            wanted = max(exact_budget(percent / 100, len(stratum)), len(groups))
            columns = torch.tensor(sorted(stratum), dtype=torch.int64)
            assert kept[sample][:, columns].sum(-1).tolist() == [wanted] * 2


def test_keep_top_counts_the_budget_of_each_image_of_a_chat_on_its_own():
    rows = [[[1, 0, 0], [0, 1, 0], [0, 0, 1]]]
    visibility = make_visibility(rows, [10, 20, 30], images=[0, 1, 2])
    for ratio, counts in [(0.1, [1, 2, 3]), (0.25, [3, 5, 8]), (0.7, [7, 14, 21]), (1, [10, 20, 30])]:
        _, kept = top_of(visibility, Budget(keep_ratio=ratio))
        for head in range(2):
            assert [int(part.sum()) for part in kept[0, head].split([10, 20, 30])] == counts


@given(anything, st.integers(1, 8))
def test_keep_top_starves_no_live_row_and_keeps_nothing_unseen(visibility, tokens):
    _, kept = top_of(visibility, Budget(keep_tokens=tokens))
    for sample in range(visibility.batch):
        for head in range(2):
            columns = set(kept[sample, head].nonzero().flatten().tolist())
            assert columns
            assert columns <= set().union(*slow_strata(visibility, sample))
            for row in live_rows(visibility, sample):
                assert columns & seen_by_row(visibility, sample, row)


@given(anything, st.integers(1, 100), st.integers(1, 100), st.integers(0, 3))
def test_keep_top_keeps_a_superset_for_a_larger_budget(visibility, one, other, seed):
    small, large = sorted([one, other])
    _, few = top_of(visibility, Budget(keep_ratio=small / 100), seed)
    _, many = top_of(visibility, Budget(keep_ratio=large / 100), seed)
    assert not bool((few & ~many).any())


@given(anything)
def test_keep_top_of_everything_keeps_everything_seen(visibility):
    _, kept = top_of(visibility, Budget(keep_ratio=1))
    assert torch.equal(kept, (visibility.strata >= 0)[:, None].expand_as(kept))


@given(conversations())
def test_keep_top_over_a_part_of_the_strata_leaves_the_others_out(visibility):
    strata = visibility.decode_strata
    scores = torch.ones(visibility.batch, 1, visibility.columns)
    kept = scoring.keep_top(scores, strata, scoring.limits(Budget(keep_ratio=1), strata), visibility)
    for sample in range(visibility.batch):
        expected = slow_decode(visibility, sample) or set(range(visibility.columns))
        assert set(kept[sample, 0].nonzero().flatten().tolist()) == expected


# pool_heads


@pytest.mark.parametrize("heads", [1, 2, 3, 8])
def test_pool_heads_is_the_average(heads):
    scores = torch.randn(2, heads, 5, dtype=torch.float64)
    pooled = scoring.pool_heads(scores)
    assert pooled.shape == (2, 1, 5)
    torch.testing.assert_close(pooled[:, 0], scores.mean(1))


@pytest.mark.parametrize("heads", range(1, 33))
def test_pooling_the_largest_numbers_gives_no_nan_and_keeps_the_order(heads):
    largest = torch.finfo(torch.float32).max
    scores = torch.tensor([largest, largest / 2, 0.0, -largest / 2, -largest]).expand(1, heads, 5)
    pooled = scoring.pool_heads(scores)[0, 0].tolist()
    assert pooled == sorted(pooled, reverse=True)
    assert len(set(pooled)) == 5


# rows and heads


@given(anything, st.integers(1, 6), st.booleans(), st.data())
def test_last_rows_are_the_last_live_rows_that_see_something(visibility, count, restrict, data):
    columns = None
    if restrict:
        size = visibility.batch * visibility.columns
        flags = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
        columns = torch.tensor(flags).reshape(visibility.batch, visibility.columns)
    marked = scoring.last_rows(visibility, count, columns)
    assert marked.shape == visibility.live.shape
    for sample in range(visibility.batch):
        wanted = (
            range(visibility.columns) if columns is None else columns[sample].nonzero().flatten().tolist()
        )
        rows = [r for r in live_rows(visibility, sample) if seen_by_row(visibility, sample, r) & set(wanted)]
        assert marked[sample].nonzero().flatten().tolist() == rows[-count:]


@given(anything)
def test_row_counts_are_the_live_rows_that_see_a_column(visibility):
    counts = scoring.row_counts(visibility)
    for sample in range(visibility.batch):
        seen = [seen_by_row(visibility, sample, row) for row in live_rows(visibility, sample)]
        expected = [sum(column in row for row in seen) for column in range(visibility.columns)]
        assert counts[sample].tolist() == expected


@given(anything)
def test_each_stratum_comes_once_and_what_decoding_sees_comes_first(visibility):
    yielded = list(scoring.each_stratum(visibility.strata))
    total = sum(members.long() for members in yielded) if yielded else torch.zeros_like(visibility.strata)
    assert torch.equal(total, (visibility.strata >= 0).long())
    assert all(members.any() for members in yielded)
    for sample in range(visibility.batch):
        sets = [set(members[sample].nonzero().flatten().tolist()) for members in yielded]
        assert [s for s in sets if s][:1] == [s for s in slow_strata(visibility, sample) if s][:1]
        assert {frozenset(s) for s in sets if s} == {
            frozenset(s) for s in slow_strata(visibility, sample) if s
        }


def test_query_heads_of_one_kv_head_are_consecutive():
    scores = torch.tensor([[[1.0], [3.0], [10.0], [20.0]]])
    assert scoring.by_kv_head(scores, 2).tolist() == [[[2.0], [15.0]]]
    assert torch.equal(scoring.by_kv_head(scores, 4), scores)


# attention_density


def slow_density(view, sample, head, threshold, columns):
    """Fraction of pairs of live row and column whose weight is at least a fraction of the row's largest."""
    kv_head = head // (view.captured.queries.shape[1] // view.keys.shape[1])
    keys = view.keys[sample, kv_head].double().tolist()
    large = pairs = 0
    for row in live_rows(view.visibility, sample):
        query = view.captured.queries[sample, head, row].double().tolist()
        seen = sorted(seen_by_row(view.visibility, sample, row) & columns)
        products = [math.fsum(q * k for q, k in zip(query, keys[c], strict=True)) for c in seen]
        weights = [math.exp(view.scaling * (product - max(products))) for product in products]
        large += sum(weight / math.fsum(weights) >= threshold / math.fsum(weights) for weight in weights)
        pairs += len(seen)
    return large / pairs if pairs else 0.0


@given(anything, st.sampled_from([0.05, 0.3, 0.9]), st.integers(0, 3), st.booleans())
def test_density_counts_the_pairs_that_are_not_small_beside_the_largest_of_their_row(
    visibility, threshold, seed, every_column
):
    view = make_view(visibility, seed=seed)
    random = torch.Generator().manual_seed(seed)
    columns = torch.rand(visibility.batch, visibility.columns, generator=random) < 0.7
    density = scoring.attention_density(
        view.queries, view.keys, visibility, view.scaling, threshold, None if every_column else columns
    )
    for sample in range(visibility.batch):
        counted = set(range(visibility.columns))
        if not every_column:
            counted = set(columns[sample].nonzero().flatten().tolist())
        for head in range(4):
            expected = slow_density(view, sample, head, threshold, counted)
            assert float(density[sample, head]) == pytest.approx(expected, abs=1e-12)


@given(conversations(), st.integers(0, 3))
def test_density_does_not_depend_on_the_order_of_columns(visibility, seed):
    view = make_view(visibility, seed=seed)
    order = torch.randperm(visibility.columns, generator=torch.Generator().manual_seed(seed))
    moved = dataclasses.replace(visibility, units=visibility.units[:, order])
    one, other = (
        scoring.attention_density(view.queries, keys, see, view.scaling, 0.3)
        for keys, see in ((view.keys, visibility), (view.keys[:, :, order], moved))
    )
    assert torch.equal(one, other)


def test_density_of_even_rows_is_one_and_of_rows_with_one_token_the_least():
    visibility = make_visibility([[[1, 0]] * 70], [5, 3])  # more rows than a chunk has
    view = make_view(visibility)

    def density(keys):
        return scoring.attention_density(view.queries, keys, visibility, view.scaling, 0.01)

    assert torch.equal(density(view.keys * 0), torch.ones(1, 4, dtype=torch.float64))
    peaked = torch.where(torch.arange(8)[:, None] == 2, 1e6 * view.keys, 0 * view.keys)
    peaked[:, :, 2] = peaked[:, :, 2].abs()
    queries = view.queries.abs()
    only = scoring.attention_density(queries, peaked, visibility, view.scaling, 0.01)
    assert torch.equal(only, torch.full((1, 4), 1 / 5, dtype=torch.float64))


def test_density_of_what_is_not_finite_is_no_number():
    visibility = make_visibility([[[1]] * 2], 5)
    view = make_view(visibility)
    for value in (torch.nan, torch.inf):
        keys = view.keys.clone()
        keys[0, 0, 3, 0] = value
        density = scoring.attention_density(view.queries.abs(), keys, visibility, view.scaling, 0.01)
        assert density.isnan().tolist() == [[True, True, False, False]]
