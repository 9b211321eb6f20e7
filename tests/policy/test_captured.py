"""What adapters capture for views: one field for each need."""

from __future__ import annotations

from dataclasses import fields
from typing import get_args

import pytest
import torch
from helpers import make_view, make_visibility
from text_views import make_text

from kvprune import FeatureView, LayerView
from kvprune.policy import Need
from kvprune.policy.captured import Captured
from kvprune.tokens.selection import Selection

B, S, T = 2, 5, 3
EVERYTHING = Captured(
    queries=torch.randn(B, 4, T, 2),
    raw_keys=torch.randn(B, 2, S, 2),
    features=torch.randn(B, S, 6),
    guidance=torch.rand(B, S),
    reconstruction=torch.rand(B, 2, S),
    class_attention=torch.rand(B, S),
    text=make_text((2, 3)),
)
RAGGED = Selection.from_mask(torch.tensor([[[1, 0, 0, 1, 1]], [[0, 1, 0, 0, 0]]], dtype=torch.bool))


def test_each_need_is_a_field_and_a_property_of_the_view():
    captured = {field.name for field in fields(Captured)}
    # text_cache shows nothing: it prunes; a grid is nothing that is captured.
    assert captured | {"text_cache", "grid"} == set(get_args(Need))
    assert all(hasattr(LayerView, name) for name in captured)
    assert all(hasattr(FeatureView, name) for name in ("features", "guidance", "class_attention"))


def test_a_selection_of_columns_is_taken_of_everything_that_has_columns():
    taken = EVERYTHING.at(RAGGED)
    for sample, columns in enumerate(([0, 3, 4], [1])):
        kept = len(columns)
        assert torch.equal(taken.features[sample, :kept], EVERYTHING.features[sample, columns])
        assert torch.equal(taken.guidance[sample, :kept], EVERYTHING.guidance[sample, columns])
        assert torch.equal(taken.class_attention[sample, :kept], EVERYTHING.class_attention[sample, columns])
        for name in ("raw_keys", "reconstruction"):
            whole = getattr(EVERYTHING, name)[sample][:, columns]
            assert torch.equal(getattr(taken, name)[sample, :, :kept], whole), name
    assert taken.queries is EVERYTHING.queries
    assert taken.text is EVERYTHING.text


def test_padding_of_a_ragged_selection_is_zero():
    taken = EVERYTHING.at(RAGGED)
    for tensor in (taken.features, taken.guidance, taken.class_attention):
        assert not tensor[1, 1:].any()
    assert not taken.raw_keys[1, :, 1:].any()


def test_all_columns_are_the_same_object():
    assert EVERYTHING.at(None) is EVERYTHING


def test_rows_are_taken_of_tensors_and_text_stays():
    taken = EVERYTHING.rows(slice(None, None, 2))
    for name in ("queries", "raw_keys", "features", "guidance", "reconstruction", "class_attention"):
        assert torch.equal(getattr(taken, name), getattr(EVERYTHING, name)[:1]), name
    assert taken.text is EVERYTHING.text
    assert EVERYTHING.rows(slice(None, None, 1)) is EVERYTHING


def test_joining_adds_what_is_missing_and_keeps_what_is_there():
    own = Captured(queries=EVERYTHING.queries)
    joined = own.joined(EVERYTHING, torch.device("cpu"))
    assert joined.queries is own.queries
    assert joined.text is EVERYTHING.text
    assert own.joined(Captured()) is own


@pytest.mark.parametrize("needs", [(), ("queries",), ("guidance", "text")])
def test_only_what_is_needed_is_shown(needs):
    shown = EVERYTHING.only(needs)
    assert {field.name for field in fields(shown) if getattr(shown, field.name) is not None} == set(needs)


def test_a_view_lets_go_of_everything_captured():
    view = make_view(make_visibility([[[1]]], 3))
    assert view.captured.queries is not None
    bare = view.without_captured()
    assert all(getattr(bare.captured, field.name) is None for field in fields(bare.captured))
    assert bare.keys is view.keys
