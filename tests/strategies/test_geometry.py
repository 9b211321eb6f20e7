"""Policies that use positions: on a picture beside a text, on a line, and where positions are unknown."""

import dataclasses

import pytest
import torch
from helpers import make_features, make_view, make_visibility
from hypothesis import given
from hypothesis import strategies as st
from kvprune_strategies import Elastic, SnapKV, TopV, VLCache

import kvprune
from kvprune import Layout
from kvprune.adapters.tiny.families import TINY_FAMILIES
from kvprune.errors import UnsupportedModelError
from kvprune.tokens.layout import AUDIO_FRAME, IMAGE_PATCH, TEXT_TOKEN


def mixed(kinds):
    """A layout whose columns of kind 0 are patches in one row, and those of kind 1 a text."""
    told = torch.tensor([kinds])
    patch = (1 - told).cumsum(-1) - 1
    places = torch.stack([torch.zeros_like(patch), patch], -1).masked_fill(told[..., None] == 1, -1)
    return Layout(places, units=(IMAGE_PATCH, TEXT_TOKEN), kinds=told)


def view_of(kinds, **fields):
    """One sample with one tile whose columns are of these kinds."""
    visibility = make_visibility([[[1]]], len(kinds))
    return make_view(visibility, layout_of=lambda: mixed(kinds), **fields)


def run_of(kinds, column):
    """The columns of one kind around a column, as a range."""
    low = high = column
    while low and kinds[low - 1] == kinds[column]:
        low -= 1
    while high + 1 < len(kinds) and kinds[high + 1] == kinds[column]:
        high += 1
    return range(low, high + 1)


kinds_of_columns = st.lists(st.integers(0, 1), min_size=2, max_size=12)


@given(kinds_of_columns, st.sampled_from([3, 5]))
def test_snapkv_pools_within_one_kind(kinds, kernel):
    view = view_of(kinds)
    plain = SnapKV(pool="none").score(view)[0]
    pooled = SnapKV(kernel=kernel).score(view)[0]
    for column in range(len(kinds)):
        near = [c for c in run_of(kinds, column) if abs(c - column) <= kernel // 2]
        torch.testing.assert_close(pooled[:, column], plain[:, near].mean(-1))


@given(kinds_of_columns, st.integers(1, 12), st.sampled_from(["tile", "image"]))
def test_elastic_joins_no_text_to_a_picture(kinds, tokens, borders):
    selection = Elastic(keep_tokens=tokens, borders=borders).select(view_of(kinds)).cache
    if selection.merge is None:
        return
    kept = selection.indices[0, 0].tolist()
    for column, place in enumerate(selection.merge.into[0, 0].tolist()):
        if place >= 0:
            assert kept[place] in run_of(kinds, column)
        else:
            assert not set(run_of(kinds, column)) & set(kept)


def test_columns_of_one_kind_are_one_segment():
    visibility = make_visibility([[[1, 1]]], 3)
    view = make_view(visibility, layout_of=lambda: Layout.line(6))
    assert view.segments is visibility.units
    view = make_view(visibility, layout_of=lambda: mixed([0, 0, 1, 1, 0, 0]))
    assert len(view.segments.unique()) == 4
    assert view.segments.unique_consecutive().numel() == 4


def test_runs_of_kinds_are_kept_when_columns_are_dropped():
    layout = mixed([0, 1, 1, 0]).at(torch.tensor([[0, 2, 3]]), torch.tensor([[True, True, False]]))
    assert layout.kinds.tolist() == [[0, 1, 0]]
    assert layout.places.tolist() == [[[0, 0], [-1, -1], [-1, -1]]]


def test_topv_knows_the_distances_of_a_line():
    """Of equal features, places alone decide, on a line as in a row of patches, the same from both ends."""
    visibility = make_visibility([[[1]]], 9)
    features = torch.ones(1, 9, 6, dtype=torch.float64)
    policy = TopV(keep_tokens=3, sigma=2.0, marginals="free")
    row = make_features(visibility, grid=9).capturing(features=features)
    line = dataclasses.replace(row, layout_of=lambda: Layout.line(9, unit=AUDIO_FRAME))
    assert torch.equal(policy.importance(line), policy.importance(row))
    found = policy.importance(line)
    torch.testing.assert_close(found, found.flip(-1))
    assert found.std() > 0.01


def unknown(columns):
    return Layout.unknown(columns, "nobody said it", units=(IMAGE_PATCH,))


def test_unknown_positions_and_class_tokens_are_refused():
    visibility = make_visibility([[[1]]], 4)
    view = make_view(visibility, layout_of=lambda: unknown(4))
    features = make_features(visibility, layout_of=lambda: unknown(4))
    for refused in (
        lambda: TopV().score(features),
        lambda: Elastic(class_tokens="apart").select(view),
        lambda: VLCache(class_tokens="ignore").measure(view),
        lambda: SnapKV(pool="2d").score(view),
    ):
        with pytest.raises(
            UnsupportedModelError, match="image patches lie, which is unknown here: nobody said"
        ):
            refused()
    assert Elastic().select(view).cache is not None  # goes by the order of the cache


@pytest.mark.parametrize("spec", ["snapkv:pool=2d", "adakv:scorer=snapkv(pool=2d)"])
@pytest.mark.parametrize("name", ["WhisperForConditionalGeneration", "BartForConditionalGeneration"])
def test_a_family_without_a_grid_is_refused_at_once(name, spec):
    with pytest.raises(UnsupportedModelError, match="needs 'grid'"):
        kvprune.compress(TINY_FAMILIES[name].model(name), spec)


@pytest.mark.parametrize("spec", ["snapkv:pool=2d,keep_ratio=0.5", "topv:keep_ratio=0.5"])
@pytest.mark.parametrize(
    "name",
    [
        "VisionEncoderDecoderModel",
        "Florence2ForConditionalGeneration",
        "Pix2StructForConditionalGeneration",
        "UdopForConditionalGeneration",
        "PPFormulaNetForConditionalGeneration",
        "BlipForConditionalGeneration",
    ],
)
def test_a_family_with_a_grid_runs(name, spec):
    model = TINY_FAMILIES[name].model(name, attn_implementation="eager")
    inputs = TINY_FAMILIES[name].batch(torch.float32, True)
    ids = torch.full((2, 2), 3)
    named = {"input_ids": ids} if name.startswith("Blip") else {"decoder_input_ids": ids}
    with kvprune.compress(model, spec) as run, torch.no_grad():
        model(**inputs, **named, use_cache=True)
    assert run.report.prefills == 1
