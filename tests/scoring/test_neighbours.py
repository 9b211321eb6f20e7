"""Pooling over neighbours against plain loops: who is a neighbour, and what a border costs."""

import math

import pytest
import torch
from helpers import make_visibility, visibilities
from hypothesis import given
from hypothesis import strategies as st

from kvprune.scoring.neighbours import lines, pool_neighbours

kernels = st.sampled_from([1, 3, 5, 9])
reductions = st.sampled_from(["avg", "max"])


@st.composite
def pictures(draw):
    """Scores, places, images and counted flags of columns in any order; some have no place."""
    batch, height, width = draw(st.integers(1, 2)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    image_count = draw(st.integers(1, 2))
    cells = [(i, r, c) for i in range(image_count) for r in range(height) for c in range(width)]
    cells = [*draw(st.permutations(cells)), (0, -1, -1)]
    places = torch.tensor([cell[1:] for cell in cells])[None]
    images = torch.tensor([cell[0] for cell in cells])[None]
    flags = draw(st.lists(st.booleans(), min_size=batch * len(cells), max_size=batch * len(cells)))
    counted = torch.tensor(flags).reshape(batch, len(cells))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    scores = torch.rand(batch, 3, len(cells), generator=generator, dtype=torch.float64)
    return scores, places, images, counted


def slow_pool(scores, places, images, counted, kernel, reduction, divisor=None):
    batch, heads, columns = scores.shape
    pooled = scores.clone()
    for b in range(batch):
        place = places[b % len(places)].tolist()
        image = images[b % len(images)].tolist()
        there = [bool(counted[b, s]) and min(place[s]) >= 0 for s in range(columns)]
        for s in range(columns):
            if not there[s]:
                continue
            near = [
                n
                for n in range(columns)
                if there[n]
                and image[n] == image[s]
                and all(abs(place[n][axis] - place[s][axis]) <= kernel // 2 for axis in range(2))
            ]
            for h in range(heads):
                values = [float(scores[b, h, n]) for n in near]
                mean = math.fsum(values) / (divisor or len(values))
                pooled[b, h, s] = max(values) if reduction == "max" else mean
    return pooled


@given(pictures(), kernels, reductions, st.sampled_from([None, 5, 9]))
def test_pooling_is_over_the_counted_neighbours_of_the_same_image(picture, kernel, reduction, divisor):
    expected = slow_pool(*picture, kernel, reduction, divisor)
    pooled = pool_neighbours(*picture, kernel, reduction, divisor)
    torch.testing.assert_close(pooled, expected, rtol=1e-12, atol=1e-14)


@given(pictures(), kernels, reductions, st.floats(0.125, 9, width=32))
def test_equal_scores_stay_equal(picture, kernel, reduction, level):
    scores = torch.full_like(picture[0], level).float()
    assert torch.equal(pool_neighbours(scores, *picture[1:], kernel, reduction), scores)


@given(pictures(), reductions)
def test_a_window_of_one_changes_nothing_and_inputs_stay(picture, reduction):
    before = picture[0].clone()
    assert torch.equal(pool_neighbours(*picture, 1, reduction), before)
    pool_neighbours(*picture, 3, reduction)
    assert torch.equal(picture[0], before)


@given(pictures(), kernels, reductions, st.data())
def test_columns_that_do_not_count_are_nobodys_neighbours(picture, kernel, reduction, data):
    scores, places, images, counted = picture
    other = torch.where((counted & (places >= 0).all(-1))[:, None], scores, torch.nan)
    kept = (counted & (places >= 0).all(-1))[:, None].expand_as(scores)
    first, second = (pool_neighbours(s, places, images, counted, kernel, reduction) for s in (scores, other))
    assert torch.equal(first[kept], second[kept])


@given(st.data(), kernels, reductions)
def test_columns_that_share_a_place_are_neighbours_and_each_counts(data, kernel, reduction):
    columns = data.draw(st.integers(1, 8))
    spots = st.tuples(st.integers(-1, 2), st.integers(0, 2))
    places = torch.tensor([data.draw(st.lists(spots, min_size=columns, max_size=columns))])
    counted = torch.tensor([data.draw(st.lists(st.booleans(), min_size=columns, max_size=columns))])
    scores = torch.randn(1, 2, columns, generator=torch.Generator().manual_seed(columns)).double()
    picture = scores, places, torch.zeros(1, columns, dtype=torch.int64), counted
    expected = slow_pool(*picture, kernel, reduction)
    torch.testing.assert_close(pool_neighbours(*picture, kernel, reduction), expected, rtol=1e-12, atol=1e-14)


def test_a_border_is_not_penalised():
    places = torch.tensor([[[0, c] for c in range(5)]])
    scores = torch.tensor([[[1.0, 1, 1, 1, 4]]])
    pooled = pool_neighbours(scores, places, torch.zeros(1, 5).long(), torch.ones(1, 5).bool(), 3)
    assert pooled.tolist() == [[[1.0, 1, 1, 2, 2.5]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_type_of_the_scores_stays(dtype):
    places = torch.tensor([[[0, 0], [0, 1]]])
    pooled = pool_neighbours(
        torch.ones(1, 1, 2, dtype=dtype), places, torch.zeros(1, 2).long(), torch.ones(1, 2).bool(), 3
    )
    assert pooled.dtype == dtype


@given(visibilities(), st.data())
def test_lines_hold_the_counted_columns_of_each_unit_in_order(visibility, data):
    count = visibility.batch * visibility.columns
    flags = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    counted = torch.tensor(flags).reshape(visibility.batch, visibility.columns)
    places, images = lines(visibility, counted)
    for sample in range(visibility.batch):
        units = visibility.units[sample % len(visibility.units)].tolist()
        for unit in set(units):
            line = [s for s, u in enumerate(units) if u == unit and counted[sample, s]]
            assert places[sample, line].tolist() == [[0, i] for i in range(len(line))]
            assert images[sample, line].tolist() == [unit] * len(line)


def test_lines_end_where_tiles_end():
    visibility = make_visibility([[[1, 1]]], 3)
    counted = torch.ones(1, 6, dtype=torch.bool)
    scores = torch.tensor([[[0.0, 0, 0, 6, 0, 0]]])
    pooled = pool_neighbours(scores, *lines(visibility, counted), counted, 3)
    assert pooled.tolist() == [[[0.0, 0, 0, 3, 2, 0]]]
