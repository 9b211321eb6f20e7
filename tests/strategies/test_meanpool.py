"""`meanpool` against plain loops, against torch's average pooling, and against a merge with equal weights."""

import math
from dataclasses import dataclass

import pytest
import torch
from generation import LAYOUTS, TOLERANCE, generate, mllama
from helpers import conversations, make_features, slow_groups, slow_strata
from hypothesis import given
from hypothesis import strategies as st
from kvprune_strategies import MeanPool
from kvprune_strategies.meanpool import _rectangles, _runs, _shares
from new_tokens import compare_to_oracle

import kvprune
from kvprune.adapters.tiny.models import mllama_inputs
from kvprune.errors import BudgetError, UnsupportedModelError
from kvprune.policy.captured import Captured
from kvprune.policy.view import FeatureView
from kvprune.tokens.layout import AUDIO_FRAME, TEXT_TOKEN, Layout
from kvprune.tokens.merging import Merge
from kvprune.tokens.replacement import Replacement
from kvprune.tokens.selection import Selection
from kvprune.tokens.visibility import Visibility

ratios = st.integers(1, 100).map(lambda percent: percent / 100)


def view_of(layout, channels=3, seed=0):
    """Return the view of one sample that sees all columns of a layout, in one unit."""
    columns = layout.places.shape[1]
    visibility = Visibility(
        rows=torch.ones(1, 1, 1, dtype=torch.bool),
        units=torch.zeros(1, columns, dtype=torch.int64),
        images=torch.zeros(1, dtype=torch.int64),
        live=torch.ones(1, 1, dtype=torch.bool),
    )
    drawn = torch.randn(1, columns, channels, generator=torch.Generator().manual_seed(seed))
    return FeatureView(
        visibility=visibility,
        num_layers=1,
        policy_name="meanpool",
        layout_of=lambda: layout,
        captured=Captured(features=drawn),
    )


def cells_of(policy, view, sample=0):
    """Return the columns of each cell of a sample, in the order of their first column."""
    found = {}
    for column, cell in enumerate(policy.cells(view)[sample].tolist()):
        if cell >= 0:
            found.setdefault(cell, []).append(column)
    return sorted(found.values())


def means(view, cells, sample=0):
    """Return the mean of each cell, in plain loops."""
    rows = view.features[sample].double().tolist()
    return [
        [math.fsum(rows[column][channel] for column in cell) / len(cell) for channel in range(len(rows[0]))]
        for cell in cells
    ]


@pytest.mark.parametrize(("rows", "across", "k"), [(8, 8, 2), (8, 8, 4), (6, 9, 3), (4, 4, 1)])
def test_squares_are_what_torch_pools(rows, across, k):
    view = view_of(Layout.grid(rows, across))
    picture = view.features[0].T.reshape(1, 3, rows, across)
    wanted = torch.nn.functional.avg_pool2d(picture, k)[0].flatten(1).T
    decision = MeanPool(k=k).choose(view)
    if k == 1:
        assert isinstance(decision.onward, Selection)
        return
    assert decision.onward.features.shape[1] == len(wanted)
    # torch orders cells by rows; so do we, because a cell's place is its first column
    assert torch.allclose(decision.onward.features[0], wanted, atol=1e-6)


@pytest.mark.parametrize(("frames", "k"), [(12, 3), (12, 4), (13, 4), (5, 8)])
def test_runs_are_what_torch_pools(frames, k):
    view = view_of(Layout.line(frames, unit=AUDIO_FRAME))
    wanted = torch.nn.functional.avg_pool1d(view.features.mT, k, ceil_mode=True, count_include_pad=False)
    got = MeanPool(k=k).choose(view).onward
    assert torch.allclose(got.features, wanted.mT, atol=1e-6)
    assert got.places.indices[0, 0].tolist() == list(range(0, frames, k))


def test_cells_at_the_edge_are_smaller():
    view = view_of(Layout.grid(3, 5))
    assert cells_of(MeanPool(k=2), view) == [[0, 1, 5, 6], [2, 3, 7, 8], [4, 9], [10, 11], [12, 13], [14]]


def test_class_tokens_stay_bit_for_bit():
    view = view_of(Layout.grid(4, 4, class_tokens=1, others=1))
    new = MeanPool(k=2).choose(view).onward
    assert new.places.indices[0, 0].tolist() == [0, 1, 2, 4, 10, 12]
    assert torch.equal(new.features[0, :2], view.features[0, :2])
    assert cells_of(MeanPool(keep_tokens=6), view) == cells_of(MeanPool(k=2), view)


@pytest.mark.parametrize("k", [2, 4])
def test_a_budget_of_squares_gives_the_squares(k):
    view = view_of(Layout.grid(8, 8))
    assert cells_of(MeanPool(keep_tokens=(8 // k) ** 2), view) == cells_of(MeanPool(k=k), view)


def slow_cells(rows, across, count):
    """Return the cells of a rectangle: bands of rows, each cut into cells of columns."""
    bands = round(math.sqrt(count * rows / across))
    bands = min(max(bands, math.ceil(count / across), 1), rows, count)
    found = []
    for band in range(bands):
        inside = [row for row in range(rows) if band * rows // bands <= row < (band + 1) * rows // bands]
        own = (band + 1) * count // bands - band * count // bands
        for cell in range(own):
            columns = [
                column
                for column in range(across)
                if cell * across // own <= column < (cell + 1) * across // own
            ]
            found.append(sorted(row * across + column for row in inside for column in columns))
    return found


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_any_number_of_cells_of_a_rectangle(rows, across, data):
    count = data.draw(st.integers(1, rows * across))
    patch = torch.arange(rows * across)
    places = torch.stack([patch // across, patch % across], -1)
    numbers = _rectangles(places, rows, across, count).tolist()
    found = [[column for column, one in enumerate(numbers) if one == cell] for cell in range(count)]
    assert found == slow_cells(rows, across, count)
    assert all(found)


@given(st.integers(1, 40), st.data())
def test_runs_are_nearly_equal(columns, data):
    count = data.draw(st.integers(1, columns))
    numbers = _runs(columns, count, torch.device("cpu")).tolist()
    sizes = [numbers.count(run) for run in range(count)]
    assert numbers == sorted(numbers)
    assert max(sizes) - min(sizes) <= 1


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 200))
def test_shares_add_up(sizes, total):
    shares = _shares(sizes, total)
    assert sum(shares) == min(max(total, len(sizes)), sum(sizes))
    assert all(1 <= share <= size for share, size in zip(shares, sizes, strict=True))


@given(conversations(), ratios)
def test_means_in_plain_loops_and_the_exact_budget(visibility, ratio):
    view = make_features(visibility)
    policy = MeanPool(keep_ratio=ratio)
    decision = policy.choose(view)
    for sample in range(visibility.batch):
        cells = cells_of(policy, view, sample)
        valid = decision.received.valid[sample, 0]
        assert decision.received.indices[sample, 0, valid].tolist() == [cell[0] for cell in cells]
        strata, groups = slow_strata(visibility, sample), slow_groups(visibility, sample)
        for stratum in filter(None, strata):
            inside = [cell for cell in cells if set(cell) <= stratum]
            assert sorted(column for cell in inside for column in cell) == sorted(stratum)
            least = sum(bool(group & stratum) for group in groups)
            assert len(inside) == max(math.ceil(round(ratio * 100) * len(stratum) / 100), least)
            for cell in inside:
                assert sum(bool(group & set(cell)) for group in groups) <= 1
        if isinstance(decision.onward, Replacement):
            got = decision.onward.features[sample, valid].double()
            assert torch.allclose(got, torch.tensor(means(view, cells, sample)).double(), atol=1e-5)


@pytest.mark.parametrize("spec", ["meanpool:k=2", "meanpool:keep_ratio=0.3", "meanpool:keep_tokens=2"])
@pytest.mark.parametrize("layouts", [LAYOUTS[2], LAYOUTS[4], LAYOUTS[5]], ids=str)
def test_a_run_equals_the_oracle_and_a_merge_with_equal_weights(spec, layouts):
    model, inputs = mllama(torch.float64), mllama_inputs(layouts, 1, torch.float64)
    policy = kvprune.get_policy(spec)
    _, apart = compare_to_oracle(model, inputs, policy, steps=2)
    assert apart <= TOLERANCE[torch.float64]

    @dataclass(frozen=True, kw_only=True)
    class Merged(MeanPool):
        def choose(self, view):
            new, cells = super().choose(view).onward, self.cells(view)  # [B, S]
            places = new.places
            into = torch.full_like(cells, -1)
            sizes = torch.ones_like(cells).double()
            for sample in range(len(cells)):
                for entry, column in enumerate(places.indices[sample, 0][places.valid[sample, 0]].tolist()):
                    members = cells[sample] == cells[sample, column]
                    into[sample, members], sizes[sample, members] = entry, 1 / members.sum()
            return kvprune.Decision(onward=places.with_merge(Merge(into[:, None], sizes[:, None])))

    results = []
    for one in (
        policy,
        Merged(**{name: getattr(policy, name) for name in ("k", "keep_ratio", "keep_tokens")}),
    ):
        with kvprune.compress(model, one):
            results.append(generate(model, inputs, steps=2)[1])
    assert float((results[0] - results[1]).abs().max()) <= TOLERANCE[torch.float64]


def test_after_it_a_policy_prunes_the_means():
    model, inputs = mllama(torch.float64), mllama_inputs(LAYOUTS[2], 1, torch.float64)
    spec = "meanpool:keep_ratio=0.5 then h2o:keep_ratio=0.5"
    run, apart = compare_to_oracle(model, inputs, kvprune.get_policy(spec), steps=2)
    assert apart <= TOLERANCE[torch.float64]
    assert run.report.kept_fraction < 0.45


def test_what_is_refused():
    with pytest.raises(BudgetError, match="takes either keep_ratio or keep_tokens or k"):
        MeanPool(k=2, keep_ratio=0.5)
    with pytest.raises(BudgetError, match="k of policy 'meanpool' is a whole number from 1, got 0"):
        MeanPool(k=0)
    with pytest.raises(BudgetError, match="states k=2 in place of a budget"):
        MeanPool(k=2).budget  # noqa: B018
    nowhere = Layout.unknown(4, "its backbone says nothing", units=(AUDIO_FRAME,))
    with pytest.raises(UnsupportedModelError, match="its backbone says nothing"):
        MeanPool(k=2).choose(view_of(nowhere))
    grid = Layout.grid(2, 2)
    mixed = Layout(
        grid.places, units=(*grid.units, TEXT_TOKEN), kinds=torch.tensor([[0, 0, 0, 1]]), geometry="grid"
    )
    with pytest.raises(UnsupportedModelError, match="puts image patches and text tokens side by side"):
        MeanPool(k=2).choose(view_of(mixed))


def test_what_it_says_about_its_budget():
    assert MeanPool(k=2).exact_budget is None
    assert MeanPool(k=2).requested == {"k": 2}
    assert str(MeanPool(k=2).spec) == "meanpool:k=2"
    assert MeanPool().exact_budget == kvprune.Budget(keep_ratio=0.5)
