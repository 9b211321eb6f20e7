"""Public strategies: what they draw is valid, and varied enough to be worth drawing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, find, given, settings

import kvprune
from kvprune import Budget, LayerView, ScoringPolicy, Selection
from kvprune.testing import strategies

ONLY_DRAW = Phase.explicit, Phase.generate
"""What is found need not be small, and shrinking takes longer than finding."""


def test_the_module_says_what_is_public():
    for name in strategies.__all__:
        strategy = getattr(strategies, name)
        assert strategy.__doc__
        assert strategy.__doc__.strip()


@given(strategies.layouts())
def test_layouts_hold_an_image_and_nothing_strange(batch):
    assert 1 <= len(batch) <= 3
    assert any(letter.isdigit() for letter in "".join(batch))
    assert set("".join(batch)) <= set("t1234")


@given(strategies.layouts(blind=False))
def test_no_sample_is_blind_unless_asked_for(batch):
    assert all(any(letter.isdigit() for letter in text) for text in batch)


@given(strategies.layer_views(dtypes=("float64",), contents=("random",)))
def test_layer_views_are_views(view):
    assert isinstance(view, LayerView)
    assert view.keys.dtype == torch.float64
    decision = kvprune.get_policy("norm:keep_ratio=0.3").select(view)
    assert decision.cache.columns == view.keys.shape[2]


@given(strategies.budgets(max_tokens=9))
def test_budgets_resolve(budget):
    assert isinstance(budget, Budget)
    assert 1 <= budget.resolve(10) <= 10
    assert budget.keep_tokens is None or budget.keep_tokens <= 9


@given(strategies.selections(batch=2, heads=2, columns=4))
def test_selections_are_valid(selection):
    assert selection == Selection(selection.indices, selection.valid, 4)
    assert selection.indices.shape[:2] == (2, 2)


def test_specs_make_policies():
    classes = [type(kvprune.get_policy(name)) for name in ("norm", "trim")]

    @given(strategies.specs(*classes))
    def each(spec):
        assert str(kvprune.get_policy(spec).spec) == str(spec)

    each()


@pytest.mark.parametrize(
    "wanted",
    [
        lambda problem: problem.family == "encoder-decoder" and problem.rank == 2,
        lambda problem: problem.arrived > 0,
        lambda problem: problem.received < 1 and problem.dtype == "bfloat16",
        lambda problem: problem.query_heads > problem.kv_heads and not problem.contiguous,
        lambda problem: any(text.count("t") == len(text) for text in problem.layouts),
    ],
)
def test_every_corner_of_the_description_is_drawn(wanted):
    search = settings(max_examples=2000, database=None, phases=ONLY_DRAW)
    assert wanted(find(strategies.layer_problems(), wanted, settings=search))


@pytest.mark.parametrize("wanted", [lambda p: p.model == "bart" and p.beams == 2, lambda p: p.kv_heads == 4])
def test_models_are_varied(wanted):
    search = settings(database=None, phases=ONLY_DRAW)
    assert wanted(find(strategies.model_problems(), wanted, settings=search))


def test_options_of_a_class_become_variants():
    from kvprune.testing.conformance.common.budgets import variants

    made = [str(policy.spec) for policy in variants(type(kvprune.get_policy("norm")))]
    assert made[0] == "norm:keep_ratio=0.5"
    for part in ("keep_ratio=0.01", "keep_ratio=1.0", "keep_tokens=1", "reach=onward", "of=raw_keys"):
        assert any(part in spec for spec in made), part
    assert len(made) == len(set(made))
    assert issubclass(type(kvprune.get_policy("norm")), ScoringPolicy)
