"""What a policy may look at, and that it must declare what has to be captured."""

import dataclasses

import pytest
import torch
from helpers import alone, conversations, make_view, make_visibility, visibilities
from hypothesis import given
from hypothesis import strategies as st

from kvprune.errors import PolicyOptionError, ScoreError


@given(st.one_of(visibilities(), conversations()))
def test_the_shorthands_are_those_of_the_visibility(visibility):
    view = make_view(visibility)
    assert view.visible is visibility.decode
    assert view.visible_in_prefill is visibility.prefill
    assert view.live is visibility.live
    assert view.groups is visibility.groups
    assert view.strata is visibility.strata


def test_what_was_captured_is_readable():
    view = make_view(make_visibility([[[1]]], 3))
    assert view.queries is view.captured.queries
    assert view.raw_keys is view.captured.raw_keys


@pytest.mark.parametrize("what", ["queries", "raw_keys"])
def test_reading_what_was_not_declared_says_what_to_declare(what):
    view = make_view(make_visibility([[[1]]], 3), rank=2, policy_name="careless").capturing(**{what: None})
    message = rf'policy \'careless\' reads view\.{what} at layer 13 .*frozenset\(\{{"{what}"\}}\)'
    with pytest.raises(PolicyOptionError, match=message):
        getattr(view, what)


def test_attention_mass_needs_queries():
    view = make_view(make_visibility([[[1]]], 3), captured_queries=None)
    with pytest.raises(PolicyOptionError, match=r"view\.queries"):
        view.attention_mass()


def test_attention_mass_uses_the_scaling_of_the_view():
    visibility = make_visibility([[[1]] * 3], 4)
    view = make_view(visibility)
    flat = dataclasses.replace(view, scaling=0.0)
    torch.testing.assert_close(
        flat.attention_mass(), torch.full((1, 4, 4), 0.75, dtype=torch.float64), rtol=1e-12, atol=0
    )
    assert not torch.allclose(view.attention_mass(), flat.attention_mass())


def test_random_numbers_have_the_shape_of_scores():
    view = make_view(make_visibility([[[1]], [[1]]], 5))
    assert view.random().shape == (2, 1, 5)
    assert view.random(heads=3).shape == (2, 3, 5)
    assert view.random().dtype == torch.float32


def test_random_numbers_are_the_same_each_time_and_differ_by_seed_layer_and_sample():
    view = make_view(make_visibility([[[1]], [[1]]], 5))
    first = view.random()
    assert torch.equal(first, view.random())
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, dataclasses.replace(view, seed=1).random())
    assert not torch.equal(first, dataclasses.replace(view, rank=1).random())
    # The index of the decoder layer is only a label.
    assert torch.equal(first, dataclasses.replace(view, layer_idx=99).random())


@given(conversations())
def test_random_numbers_of_a_sample_are_the_same_alone_and_in_a_batch(visibility):
    view = make_view(visibility)
    for sample in range(visibility.batch):
        assert torch.equal(alone(view, sample).random(2)[0], view.random(2)[sample])


def test_one_fingerprint_serves_all_samples_if_there_is_only_one():
    view = make_view(make_visibility([[[1]], [[1]]], 5), fingerprints=lambda: torch.tensor([4]))
    assert torch.equal(view.random()[0], view.random()[1])


def test_fingerprints_are_taken_only_for_policies_that_draw():
    def refuse():
        raise AssertionError("the encoder's input was read")

    view = make_view(make_visibility([[[1]]], 5), fingerprints=refuse)
    view.attention_mass()
    assert view.visible.all()
    with pytest.raises(AssertionError, match="the encoder's input was read"):
        view.random()


def test_the_generator_is_seeded_by_seed_and_layer():
    view = make_view(make_visibility([[[1]]], 5), seed=0)

    def draw(**fields):
        return torch.rand(4, generator=dataclasses.replace(view, **fields).generator).tolist()

    assert draw() == draw()
    assert len({tuple(draw()), tuple(draw(seed=1)), tuple(draw(rank=1))}) == 3
    assert view.generator is view.generator
    assert view.generator.device.type == "cpu"


def test_a_view_cannot_be_assigned_to():
    view = make_view(make_visibility([[[1]]], 3))
    for field in dataclasses.fields(view):
        with pytest.raises(dataclasses.FrozenInstanceError, match=field.name):
            setattr(view, field.name, None)


@pytest.mark.parametrize("size", [1e30, torch.nan])
def test_attention_that_is_not_finite_is_a_typed_error(size):
    view = make_view(make_visibility([[[1]]], 4), dtype=torch.float32)
    huge = dataclasses.replace(view.capturing(queries=view.queries * size), keys=view.keys * size)
    with pytest.raises(ScoreError, match=r"layer 3: attention is NaN or infinite for \d+ of 16 pairs"):
        huge.attention_mass()
    with pytest.raises(ScoreError, match=r"layer 3: attention is NaN or infinite for \d+ of 4 heads"):
        huge.attention_density(0.01)
