"""`snapkv`: attention of the last rows, averaged by KV head, pooled over neighbours."""

import dataclasses
import math

import pytest
import torch
from helpers import (
    alone,
    conversations,
    kept_sets,
    live_rows,
    make_view,
    make_visibility,
    seen_by_row,
    slow_attention,
    slow_strata,
)
from hypothesis import given
from hypothesis import strategies as st
from kvprune_strategies import H2O, SnapKV

import kvprune
from kvprune import Layout
from kvprune.errors import PolicyOptionError, UnsupportedModelError

ACROSS = 3  # patches of a tile of two rows, whose first column is a class token
PATCHES = 2 * ACROSS + 1


def tiled_view(visibility, **fields):
    """Tiles of 2 x 3 patches behind a class token stand side by side, two to an image."""
    tiles = visibility.columns // PATCHES
    places = []
    for tile in range(tiles):
        places.append([-1, -1])
        places += [[r, c + tile % 2 * ACROSS] for r in range(2) for c in range(ACROSS)]
    return make_view(visibility, layout_of=lambda: Layout(torch.tensor([places])), **fields)


def near(view, pool, kernel, one, other):
    """Whether two columns of one sample are neighbours."""
    tile, other_tile = one // PATCHES, other // PATCHES
    if pool == "1d":
        return tile == other_tile and abs(one - other) <= kernel // 2
    a, b = view.places[0, one].tolist(), view.places[0, other].tolist()
    if min(a) < 0 or min(b) < 0:
        return one == other
    same_image = tile // 2 == other_tile // 2
    return same_image and max(abs(a[0] - b[0]), abs(a[1] - b[1])) <= kernel // 2


def slow_scores(view, sample, policy):
    see = view.visibility
    pool, kernel = policy.pool, policy.kernel
    scores = [[0.0] * see.columns for _ in range(2)]
    for stratum in slow_strata(see, sample):
        voters = [r for r in live_rows(see, sample) if seen_by_row(see, sample, r) & stratum][
            -policy.window :
        ]
        counted = [[b == sample and r in voters for r in range(see.live.shape[1])] for b in range(see.batch)]
        by_head = [slow_attention(view, sample, head, counted) for head in range(4)]
        for kv_head in range(2):
            mass = [(one + other) / 2 for one, other in zip(*by_head[2 * kv_head :][:2], strict=True)]
            for column in stratum:
                values = [
                    mass[c]
                    for c in stratum
                    if c == column or (pool != "none" and near(view, pool, kernel, column, c))
                ]
                size = len(values)
                alone_in_its_window = pool == "2d" and column % PATCHES == 0  # a class token
                if policy.border == "zeros" and pool != "none" and not alone_in_its_window:
                    size = kernel if pool == "1d" else kernel**2
                pooled = max(values) if policy.reduction == "max" else math.fsum(values) / size
                scores[kv_head][column] = pooled
    return scores


@given(
    conversations(patches=PATCHES, max_images=2, max_batch=2),
    st.integers(1, 4),
    st.sampled_from([1, 3, 5]),
    st.sampled_from(["1d", "2d", "none"]),
    st.sampled_from(["avg", "max"]),
    st.sampled_from(["exists", "zeros"]),
)
def test_scores_are_the_pooled_attention_of_the_window(visibility, window, kernel, pool, reduction, border):
    view = tiled_view(visibility)
    policy = SnapKV(window=window, kernel=kernel, pool=pool, reduction=reduction, border=border)
    expected = [slow_scores(view, b, policy) for b in range(visibility.batch)]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(policy.score(view), expected, rtol=1e-10, atol=1e-12)


@given(conversations(patches=PATCHES), st.sampled_from(["1d", "2d", "none"]))
def test_a_window_of_all_rows_without_pooling_is_observed_attention(visibility, pool):
    view = tiled_view(visibility)
    snap = SnapKV(kernel=1, window=99, pool=pool).score(view)
    torch.testing.assert_close(
        torch.where((view.strata == 0)[:, None], snap, 0),
        torch.where((view.strata == 0)[:, None], H2O(normalize=False).score(view), 0),
    )


@pytest.mark.parametrize("pool", ["1d", "2d"])
def test_pooling_leaves_even_attention_even(pool):
    view = tiled_view(make_visibility([[[1, 1]] * 3], PATCHES), dtype=torch.float32)
    view = dataclasses.replace(view, keys=torch.zeros_like(view.keys))
    scores = SnapKV(pool=pool).score(view)
    assert scores.unique().numel() == 1


def test_only_two_dimensions_need_to_know_where_tokens_lie():
    view = make_view(make_visibility([[[1]] * 2], 8))
    for pool in ("1d", "none"):
        SnapKV(pool=pool).select(view)
    with pytest.raises(UnsupportedModelError, match="where tokens lie"):
        SnapKV(pool="2d").select(view)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("snapkv:window=0", "at least 1, got 0"),
        ("snapkv:kernel=4", "odd number of tokens, such as 3 or 5, got 4"),
        ("snapkv:kernel=-1", "odd number of tokens, such as 3 or 5, got -1"),
        ("snapkv:pool=3d", r"must be 1d \| 2d \| none, got '3d'"),
        ("snapkv:reduction=min", r"must be avg \| max, got 'min'"),
        ("snapkv:border=ones", r"must be exists \| zeros, got 'ones'"),
    ],
)
def test_wrong_options_are_refused(spec, message):
    with pytest.raises(PolicyOptionError, match=message):
        kvprune.get_policy(spec)


def test_presets_are_the_published_settings():
    """Window, kernel, pooling and borders; the budget is the user's."""
    settings = {
        "published": SnapKV(window=32, kernel=7, reduction="max"),
        "kvcache-factory": SnapKV(window=8, kernel=7, reduction="max"),
        "kvpress": SnapKV(window=64, kernel=5, reduction="avg", border="zeros"),
    }
    assert set(settings) == set(SnapKV.presets)
    for preset, policy in settings.items():
        assert kvprune.get_policy(f"snapkv:preset={preset}") == policy


def test_equal_scores_keep_the_first_tokens():
    view = make_view(make_visibility([[[1]] * 2], 6))
    equal = dataclasses.replace(view, keys=torch.ones_like(view.keys))
    assert kept_sets(SnapKV().select(equal).cache) == [[{0, 1, 2}, {0, 1, 2}]]
    assert SnapKV().needs == {"queries"}


@given(conversations(patches=PATCHES), st.sampled_from(["1d", "2d"]), st.sampled_from(["layer", "onward"]))
def test_a_sample_keeps_alone_what_it_keeps_in_a_batch(visibility, pool, reach):
    view, policy = tiled_view(visibility), SnapKV(pool=pool, kernel=3, reach=reach)
    together = kept_sets(policy.select(view).cache)
    for sample in range(visibility.batch):
        one = dataclasses.replace(alone(view, sample), layout_of=view.layout_of)
        assert kept_sets(policy.select(one).cache)[0] == together[sample]
