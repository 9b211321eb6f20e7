"""Problems: the same tensors from the same description, and the same visibility as the real processor's."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given

from kvprune.testing import LayerProblem, ModelProblem, mllama_inputs
from kvprune.testing.conformance.policies.corner_cases import LAYER_CORNERS, MODEL_CORNERS
from kvprune.testing.cutting import cut_to_sample
from kvprune.testing.reference import slow_decode, slow_prefill, slow_strata
from kvprune.testing.strategies import layer_problems, layouts, model_problems


@given(layer_problems())
def test_a_description_can_be_pasted_and_draws_the_same(problem):
    pasted = eval(repr(problem), {"LayerProblem": LayerProblem})
    assert pasted == problem
    first, again = problem.view(), pasted.view()
    for name in ("keys", "values", "queries", "raw_keys", "visible", "live", "groups"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert torch.equal(first.random(), again.random())


@given(model_problems())
def test_a_model_problem_can_be_pasted(problem):
    assert eval(repr(problem), {"ModelProblem": ModelProblem}) == problem


def test_only_what_differs_from_defaults_is_shown():
    assert repr(LayerProblem(patches=3)) == "LayerProblem(patches=3)"
    assert repr(LayerProblem()) == "LayerProblem()"


@given(layouts())
def test_rows_see_what_the_processor_says(batch):
    inputs = mllama_inputs(batch)
    see = LayerProblem(layouts=batch).visibility()
    assert torch.equal(see.rows, inputs["cross_attention_mask"].flatten(2).bool())
    assert torch.equal(see.live, see.rows.any(-1) & inputs["attention_mask"].bool())


@given(layer_problems())
def test_views_are_what_they_say(problem):
    view = problem.view()
    batch, heads, columns, width = view.keys.shape
    assert (batch, heads, width) == (len(problem.layouts), problem.kv_heads, problem.width)
    assert view.values.shape == view.raw_keys.shape == view.keys.shape
    assert view.queries.shape == (batch, problem.query_heads, view.live.shape[1], width)
    assert view.keys.dtype == getattr(torch, problem.dtype)
    assert view.visible.shape == (batch, columns)
    for sample in range(batch):
        assert view.visible[sample].nonzero().squeeze(1).tolist() == sorted(
            slow_decode(view.visibility, sample)
        )
        assert view.visible_in_prefill[sample].nonzero().squeeze(1).tolist() == sorted(
            slow_prefill(view.visibility, sample)
        )
        seen = {
            frozenset(torch.where(view.strata[sample] == number)[0].tolist())
            for number in set(view.strata[sample].tolist()) - {-1}
        }
        assert seen == {frozenset(stratum) for stratum in slow_strata(view.visibility, sample) if stratum}


@given(layer_problems())
def test_a_sample_alone_sees_the_same_columns(problem):
    view = problem.view()
    for sample in range(len(problem.layouts)):
        alone = cut_to_sample(view, problem, sample)
        width = alone.keys.shape[2]
        assert alone.keys.shape[0] == 1
        assert torch.equal(alone.keys[0], view.keys[sample, :, :width])
        assert slow_prefill(alone.visibility, 0) == slow_prefill(view.visibility, sample)
        assert slow_decode(alone.visibility, 0) == slow_decode(view.visibility, sample)
        assert torch.equal(alone.queries[0], view.queries[sample, :, -alone.live.shape[1] :])


def test_contents_are_traps():
    def values(content):
        return LayerProblem(layouts=("4t",), content=content).view().values

    assert set(values("ties").unique().tolist()) == {0.0, 1.0}
    assert values("equal").unique().tolist() == [1.0]
    assert values("zero").unique().tolist() == [0.0]
    assert values("huge").abs().max() > 1e4
    assert LayerProblem(layouts=("4t",), content="huge", dtype="float16").view().values.isfinite().all()


def test_corners_hold_what_random_problems_may_miss():
    views = [problem.view() for problem in LAYER_CORNERS]
    assert any(int(view.visible.sum()) == 1 for view in views)  # one visible token
    assert any(not view.visible_in_prefill.any(-1).all() for view in views)  # a sample without an image
    assert any(view.visibility.exists is not None and not view.visibility.exists.all() for view in views)
    assert any(not view.keys.is_contiguous() for view in views)
    assert any(view.queries.shape[1] > view.keys.shape[1] for view in views)  # GQA
    assert any(view.visibility.has_several_groups for view in views)
    assert {problem.dtype for problem in LAYER_CORNERS} == {"float32", "float64", "bfloat16", "float16"}
    assert {problem.content for problem in LAYER_CORNERS} == {"random", "ties", "equal", "zero", "huge"}
    assert {problem.model for problem in MODEL_CORNERS} == {"mllama", "bart"}
    assert max(problem.beams for problem in MODEL_CORNERS) > 1


@pytest.mark.parametrize("problem", MODEL_CORNERS, ids=repr)
def test_model_problems_draw_the_same(problem):
    first, again = problem.make_inputs(), problem.make_inputs()
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = dataclasses.replace(problem, seed=problem.seed + 1).make_inputs()
    assert any(not torch.equal(first[name], other[name]) for name in first)
