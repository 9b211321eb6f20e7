"""Greedy selection: the lazy way picks what plain loops over exact numbers pick, ties by position."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvprune.errors import ScoreError
from kvprune.scoring import farthest, farthest_first, greedy, largest_volume, volume

KINDS = ("normal", "copies", "whole numbers", "one-hot", "zeros", "scaled copies", "clusters")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True, params=["lazily", "all at once"])
def fronts(request, monkeypatch):
    """With small numbers here, the lazy way is tested on small problems."""
    if request.param == "lazily":
        for module, name, value in (
            (greedy, "_FEW", 8),
            (greedy, "_FRONT", 6),
            (greedy, "_STEPS", 2),
            (farthest, "_ALL", 8),
            (farthest, "_AT_ONCE", 16),
            (volume, "_AT_ONCE", 16),
        ):
            monkeypatch.setattr(module, name, value)


@st.composite
def problems(draw):
    """Vectors of any dtype, and some of their columns."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    n, width = draw(st.sampled_from([1, 2, 9, 40, 90])), draw(st.sampled_from([1, 2, 3, 8, 50]))
    vectors = torch.randn(n, width, generator=random, dtype=torch.float64)
    kind = draw(st.sampled_from(KINDS))
    some = torch.randint(0, n // 3 + 1, (n,), generator=random)
    if kind == "copies":
        vectors = vectors[some]
    elif kind == "whole numbers":
        vectors = torch.randint(-1, 2, (n, width), generator=random).double()
    elif kind == "one-hot":
        vectors = torch.eye(width).double()[torch.randint(0, width, (n,), generator=random)]
    elif kind == "zeros":
        vectors = vectors * (some % 2)[:, None]
    elif kind == "scaled copies":
        vectors = vectors[some] * 2.0 ** torch.randint(-3, 4, (n, 1), generator=random)
    elif kind == "clusters":
        vectors = vectors[some // 3] + 0.1 * vectors
    columns = (torch.rand(n, generator=random) < draw(st.sampled_from([0.7, 2]))).nonzero().squeeze(1)
    weights = torch.rand(len(columns), generator=random) ** draw(st.sampled_from([0, 1, 4])) * 0.99 + 0.01
    return vectors.to(draw(st.sampled_from(DTYPES))), columns, weights


def cosines(vectors, columns):
    chosen = vectors[columns].double()
    lengths = chosen.norm(dim=1, keepdim=True)
    units = torch.where(lengths > 0, chosen / lengths, 0)
    return units @ units.mT, lengths[:, 0] > 0


def first_within(values, free, tolerance=1e-11):
    """The first free place whose value is the highest one, up to rounding."""
    best = values[free].max()
    return int(((values >= best - tolerance) & free).nonzero()[0])


def slow_farthest(vectors, columns):
    alike, _ = cosines(vectors, columns)
    nearest = (alike - 3 * torch.eye(len(columns)).double()).amax(1)
    free, order = torch.ones(len(columns), dtype=torch.bool), []
    while free.any():
        pick = first_within(-nearest, free)
        nearest = torch.maximum(nearest, alike[pick]) if order else alike[pick]
        free[pick] = False
        order.append(pick)
    return order


def slow_volume(vectors, columns, weights):
    alike, exists = cosines(vectors, columns)
    exhausted = 1e-12 if vectors.dtype == torch.float64 else 1e-5
    left, weights = exists.double(), weights.double()
    factor, free, order = alike[:, :0], torch.ones(len(columns), dtype=torch.bool), []
    while free.any():
        gains = torch.where(left > exhausted, weights.square() * left, weights - 2)
        pick = first_within(gains, free)
        if left[pick] > exhausted:
            row = (alike[pick] - factor @ factor[pick]) / left[pick].sqrt()
            factor, left = torch.cat([factor, row[:, None]], 1), (left - row.square()).clamp(min=0)
        free[pick] = False
        order.append(pick)
    return order


@given(problems(), st.data())
def test_farthest_points_are_those_of_plain_loops(problem, data):
    vectors, columns, _ = problem
    if len(columns):
        count = data.draw(st.integers(1, len(columns)))
        assert farthest_first(vectors, columns, count).tolist() == slow_farthest(vectors, columns)[:count]


@given(problems(), st.data())
def test_largest_volumes_are_those_of_plain_loops(problem, data):
    vectors, columns, weights = problem
    if len(columns):
        count = data.draw(st.integers(1, len(columns)))
        found = largest_volume(vectors, columns, weights, count).tolist()
        assert found == slow_volume(vectors, columns, weights)[:count]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_problem_is_picked_as_by_plain_loops(dtype):
    vectors = torch.randn(900, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    columns, weights = torch.arange(900), torch.linspace(0.5, 1, 900)
    assert farthest_first(vectors, columns, 90).tolist() == slow_farthest(vectors, columns)[:90]
    found = largest_volume(vectors, columns, weights, 90).tolist()
    assert found == slow_volume(vectors, columns, weights)[:90]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_vectors_that_are_not_finite_are_refused(value):
    vectors = torch.randn(20, 4)
    vectors[3, 1] = value
    with pytest.raises(ScoreError, match="NaN or infinite"):
        farthest_first(vectors, torch.arange(20), 5)
    with pytest.raises(ScoreError, match="NaN or infinite"):
        largest_volume(vectors, torch.arange(20), torch.ones(20), 5)
    others = torch.arange(4, 20)  # it takes no part
    assert len(farthest_first(vectors, others, 5)) == len(largest_volume(vectors, others, torch.ones(16), 5))
