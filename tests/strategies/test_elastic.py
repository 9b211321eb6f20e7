"""`elastic` against the method's definition, written with loops: importance, anchors, buckets, means."""

import dataclasses
import math

import pytest
import torch
from generation import TOLERANCE, difference_to_oracle, mllama
from helpers import (
    alone,
    conversations,
    exact_budget,
    kept_sets,
    make_view,
    make_visibility,
    slow_attention,
    slow_groups,
    slow_strata,
)
from hypothesis import given
from hypothesis import strategies as st
from kvprune_strategies import Elastic

import kvprune
from kvprune import Layout
from kvprune.errors import BudgetError, PolicyOptionError, UnsupportedModelError
from kvprune.testing import mllama_inputs

ratios = st.integers(1, 100).map(lambda percent: percent / 100)
borders = st.sampled_from(["tile", "image"])
QUERY_HEADS = 4


def importance(view, sample):
    """Mean over heads of the attention that live rows pay, by column."""
    by_head = [slow_attention(view, sample, head) for head in range(QUERY_HEADS)]
    return [math.fsum(column) / QUERY_HEADS for column in zip(*by_head, strict=True)]


def top_k(view, sample, ratio):
    """The best column of each image, then the best ones, as many as the budget says."""
    score = importance(view, sample)
    visible = slow_strata(view.visibility, sample)[0]
    order = sorted(visible, key=lambda column: (-score[column], column))
    groups = [group & visible for group in slow_groups(view.visibility, sample) if group & visible]
    best = {min(group, key=order.index) for group in groups}
    count = max(exact_budget(ratio, len(visible)), len(best))
    return set(sorted(order, key=lambda column: (column not in best, order.index(column)))[:count])


def nearest_anchor(view, sample, column, kept, borders):
    """The nearest anchor in the tile, or else in the image; the lower of two."""
    see = view.visibility
    units = see.units[0 if len(see.units) == 1 else sample].tolist()
    same_image = [anchor for anchor in kept if see.images[units[anchor]] == see.images[units[column]]]
    same_tile = [anchor for anchor in kept if units[anchor] == units[column]]
    reach = same_tile if borders == "tile" and same_tile else same_image
    return min(reach, key=lambda anchor: (abs(anchor - column), anchor))


def buckets(selection, sample):
    """Members of each anchor."""
    kept = selection.indices[sample, 0].tolist()
    members = {anchor: [] for anchor in kept}
    for column, entry in enumerate(selection.merge.into[sample, 0].tolist()):
        if entry >= 0:
            members[kept[entry]].append(column)
    return members


@given(conversations(), ratios, borders, st.integers(0, 3))
def test_anchors_are_the_exact_top_k_and_buckets_those_nearest(visibility, ratio, borders, seed):
    view = make_view(visibility, seed=seed)
    selection = Elastic(keep_ratio=ratio, borders=borders).select(view).cache
    for sample in range(visibility.batch):
        visible = slow_strata(visibility, sample)[0]
        if not visible:
            continue
        (kept,) = kept_sets(selection)[sample]
        assert kept == top_k(view, sample, ratio)
        members = buckets(selection, sample)
        # Where text sees no image, an image may be without an anchor; what it has goes.
        images = visibility.images[visibility.units.expand(visibility.batch, -1)[sample]].tolist()
        reached = {images[anchor] for anchor in kept}
        merged = sorted(column for bucket in members.values() for column in bucket)
        assert merged == sorted(column for column in visible if images[column] in reached)
        assert (
            len(reached) == len({images[column] for column in visible}) or not visibility.live[sample].any()
        )
        for anchor, bucket in members.items():
            for column in bucket:
                assert nearest_anchor(view, sample, column, kept, borders) == anchor


@given(conversations(), ratios, st.booleans(), st.booleans())
def test_weights_are_plain_means_and_options_are_passed_on(visibility, ratio, renormalize, size_bias):
    policy = Elastic(keep_ratio=ratio, renormalize_keys=renormalize, size_bias=size_bias)
    merge = policy.select(make_view(visibility)).cache.merge
    assert (merge.renormalize_keys, merge.size_bias) == (renormalize, size_bias)
    for into, weights in zip(merge.into.flatten(0, 1).tolist(), merge.weights.flatten(0, 1), strict=True):
        for column, entry in enumerate(into):
            if entry >= 0:
                assert float(weights[column]) == 1 / into.count(entry)


@given(conversations(), ratios, st.integers(0, 2))
def test_a_sample_alone_merges_as_in_the_batch(visibility, ratio, seed):
    view = make_view(visibility, seed=seed)
    together = Elastic(keep_ratio=ratio).select(view).cache
    for sample in range(visibility.batch):
        by_itself = Elastic(keep_ratio=ratio).select(alone(view, sample)).cache
        assert buckets(by_itself, 0) == buckets(together, sample)


def test_equal_importance_and_equal_distance_go_to_the_lower_column():
    view = make_view(make_visibility([[[1]]], 7))
    queries = torch.zeros_like(view.queries)
    even = view.capturing(queries=queries)
    assert kept_sets(Elastic(keep_ratio=0.25).select(even).cache) == [[{0, 1}]]
    keys = torch.zeros_like(view.keys)
    keys[:, :, [1, 5]] = 1
    pulled = dataclasses.replace(view.capturing(queries=torch.ones_like(queries)), keys=keys)
    assert buckets(Elastic(keep_tokens=2).select(pulled).cache, 0) == {1: [0, 1, 2, 3], 5: [4, 5, 6]}


def test_the_published_buckets_end_at_images_only():
    assert kvprune.get_policy("elastic:preset=published") == Elastic(borders="image")


def test_buckets_end_at_tiles_and_images_or_at_images_only():
    # Tiles of two columns: three in the first image, one in the second. Anchors: 2 and 7.
    view = make_view(make_visibility([[[1, 1, 1, 1]]], 2, images=[0, 0, 0, 1]))
    keys = torch.zeros_like(view.keys)
    keys[:, :, [2, 4, 7]] = 5
    pulled = dataclasses.replace(view.capturing(queries=torch.ones_like(view.queries)), keys=keys)
    by_tile = Elastic(keep_tokens=3).select(pulled).cache
    assert buckets(by_tile, 0) == {2: [0, 1, 2, 3], 4: [4, 5], 7: [6, 7]}  # tile 0 has no anchor of its own
    by_image = Elastic(keep_tokens=3, borders="image").select(pulled).cache
    assert buckets(by_image, 0) == {2: [0, 1, 2, 3], 4: [4, 5], 7: [6, 7]}
    keys = torch.zeros_like(view.keys)
    keys[:, :, [3, 5, 7]] = 5
    moved = dataclasses.replace(pulled, keys=keys)
    assert buckets(Elastic(keep_tokens=3).select(moved).cache, 0) == {3: [0, 1, 2, 3], 5: [4, 5], 7: [6, 7]}
    assert buckets(Elastic(keep_tokens=3, borders="image").select(moved).cache, 0) == {
        3: [0, 1, 2, 3, 4],
        5: [5],
        7: [6, 7],
    }


def test_class_tokens_apart_are_members_of_no_bucket_but_their_own():
    view = make_view(make_visibility([[[1, 1]]], 3))
    keys = torch.zeros_like(view.keys)
    keys[:, :, [0, 1]] = 5
    pulled = dataclasses.replace(view.capturing(queries=torch.ones_like(view.queries)), keys=keys)
    with pytest.raises(UnsupportedModelError, match="where tokens lie"):
        Elastic(class_tokens="apart").select(pulled)
    is_class = torch.tensor([[True, False, False] * 2])
    told = dataclasses.replace(
        pulled, layout_of=lambda: Layout(torch.zeros(1, 6, 2, dtype=torch.int64), is_class)
    )
    assert buckets(Elastic(keep_tokens=2, class_tokens="apart").select(told).cache, 0) == {
        0: [0],
        1: [1, 2, 4, 5],
    }
    assert buckets(Elastic(keep_tokens=2).select(told).cache, 0) == {0: [0], 1: [1, 2, 3, 4, 5]}
    untold = dataclasses.replace(told, layout_of=lambda: Layout.line(6))  # an encoder without class tokens
    assert buckets(Elastic(keep_tokens=2, class_tokens="apart").select(untold).cache, 0) == {
        0: [0],
        1: [1, 2, 3, 4, 5],
    }


def test_keeping_all_merges_nothing_into_anything():
    view = make_view(make_visibility([[[1, 1, 0]]], 3))
    selection = Elastic(keep_ratio=1.0, size_bias=True).select(view).cache
    assert buckets(selection, 0) == {column: [column] for column in range(6)}
    with kvprune.compress(mllama(), "elastic:keep_ratio=1,size_bias=true,renormalize_keys=true") as run:
        mllama()(**mllama_inputs(["4tt"]), use_cache=True)
    assert all(selection.merge is None for selection in run.selections.values())


def test_values_that_are_equal_leave_the_output_as_it_was():
    """A mean of equal values is that value, whatever the buckets are."""
    model = mllama(torch.float64)
    inputs = mllama_inputs(["tt4ttt", "1ttt"], dtype=torch.float64)
    projections = [model.model.language_model.layers[layer].cross_attn.v_proj for layer in (1, 3, 5)]

    def constant(module, args, output):
        return torch.ones_like(output) * torch.arange(output.shape[-1], dtype=output.dtype)

    handles = [projection.register_forward_hook(constant) for projection in projections]
    try:
        stock = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        with kvprune.compress(model, "elastic:keep_ratio=0.1"):
            merged = model.generate(
                **inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
    finally:
        for handle in handles:
            handle.remove()
    for one, other in zip(stock["logits"], merged["logits"], strict=True):
        assert (one - other).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"keep_ratio": 0.0}, BudgetError),
        ({"keep_tokens": 0}, BudgetError),
        ({"keep_ratio": 0.5, "keep_tokens": 3}, BudgetError),
        ({"borders": "none"}, PolicyOptionError),
        ({"class_tokens": "keep"}, PolicyOptionError),
        ({"size_bias": "yes"}, PolicyOptionError),
    ],
)
def test_bad_options_raise(options, error):
    with pytest.raises(error):
        Elastic(**options)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "spec", ["elastic", "elastic:keep_ratio=0.2,size_bias=true,renormalize_keys=true,borders=image"]
)
def test_generation_equals_the_oracle(spec, attention):
    inputs = mllama_inputs(["tt4tt1tt", "t2tt", "14ttt"])
    assert difference_to_oracle(mllama(torch.float32, attention), inputs, spec) <= TOLERANCE[torch.float32]
