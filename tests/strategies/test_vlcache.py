"""`vlcache` against its rule with plain loops: layers share the budget by the density of their attention."""

import math

import pytest
import torch
from helpers import alone, conversations, exact_budget, live_rows, make_view, make_visibility, seen_by_row
from hypothesis import given
from hypothesis import strategies as st
from kvprune_strategies import H2O, Norm, VLCache
from sharing import best_of, concluded, counts_of, kept_by_layer, layers_over, share_out, visible_of

import kvprune
from kvprune.errors import PolicyOptionError
from kvprune.tokens.layout import Layout

ratios = st.integers(1, 100).map(lambda percent: percent / 100)


def slow_density(view, sample, threshold, columns):
    """Part of the pairs of rows and columns whose weight is not small, mean over four query heads."""
    densities = []
    for head in range(4):
        keys = view.keys[sample, head // 2].double().tolist()
        large = pairs = 0
        for row in live_rows(view.visibility, sample):
            query = view.queries[sample, head, row].double().tolist()
            seen = seen_by_row(view.visibility, sample, row) & columns
            weights = [
                math.exp(view.scaling * math.fsum(q * k for q, k in zip(query, keys[c], strict=True)))
                for c in seen
            ]
            large += sum(weight >= threshold * max(weights) for weight in weights)
            pairs += len(seen)
        densities.append(large / pairs if pairs else 0.0)
    return math.fsum(densities) / 4


@given(conversations(), ratios, st.sampled_from([0.1, 0.5, 0.9]), st.integers(0, 3))
def test_layers_keep_the_best_of_their_share_by_density(visibility, ratio, threshold, seed):
    views = layers_over(visibility, seed)
    kept = kept_by_layer(VLCache(keep_ratio=ratio, threshold=threshold, scorer=Norm()), views)
    for sample in range(visibility.batch):
        visible = visible_of(visibility, sample)
        density = [slow_density(view, sample, threshold, visible) for view in views]
        even = exact_budget(ratio, len(visible))
        counts = share_out(
            lambda layer, place, d=density: d[layer] / (place + 0.5), [1] * 3, [len(visible)] * 3, 3 * even
        )
        for layer, view in enumerate(views):
            norms = view.values.norm(dim=-1)[sample].tolist()
            assert kept[layer][sample] == [best_of(of, visible, counts[layer]) for of in norms]


def test_heads_can_share_what_all_of_them_rank_highest():
    views = layers_over(make_visibility([[[1]] * 3], 20))
    separate, shared = (
        kept_by_layer(VLCache(keep_ratio=0.25, heads=of), views) for of in ("separate", "shared")
    )
    assert kvprune.get_policy("vlcache:preset=effivlm") == VLCache(heads="shared")
    for view, by_head, together in zip(views, separate, shared, strict=True):
        mass = view.attention_mass()[0].sum(0).tolist()
        assert together[0] == [best_of(mass, range(20), len(by_head[0][0]))]  # as many, one set for all heads


def densities(*scales, rows=3, columns=300, **options):
    """Views of layers with sharper and flatter attention."""
    visibility = make_visibility([[[1]] * rows], columns)
    base = make_view(visibility, seed=5)
    return [make_view(visibility, keys=base.keys * scale, captured_queries=base.queries) for scale in scales]


def test_equal_layers_keep_the_same():
    assert counts_of(VLCache(keep_ratio=0.25), densities(2, 2, 2)) == [75] * 3


def test_sparser_layers_keep_less_and_all_together_the_budget():
    counts = counts_of(VLCache(keep_ratio=0.25), densities(0, 2, 4, 30))
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == 4
    assert sum(counts) == 4 * 75


def test_even_rows_have_density_one_and_pointed_ones_the_least():
    flat, pointed = (VLCache().measure(view) for view in densities(0, 1e6))
    assert flat.tolist() == [[1.0]]
    assert pointed.tolist() == [[1 / 300]]


def test_density_depends_on_temperature_but_not_on_the_order_of_tokens():
    one, hotter = densities(3, 1)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    (moved,) = densities(3)
    moved = make_view(
        moved.visibility, keys=one.keys[:, :, order], captured_queries=one.queries, values=one.values
    )
    assert VLCache().measure(moved).tolist() == VLCache().measure(one).tolist()
    assert VLCache().measure(hotter) > VLCache().measure(one)


def test_a_layer_keeps_a_hundredth_at_least_and_all_at_most_and_the_others_make_up_for_it():
    views = densities(0, 1e6)
    decisions = concluded(VLCache(keep_ratio=0.25), views)
    assert [int(decision.cache.counts[0, 0]) for decision in decisions] == [147, 3]
    assert "what was over or missing was shared" in decisions[0].note
    assert counts_of(VLCache(keep_ratio=0.75), views) == [300, 150]
    # Where the budget itself is less than a hundredth, it is kept.
    assert counts_of(VLCache(keep_tokens=2), views) == [2, 2]
    for keep_all in (VLCache(keep_ratio=1.0), VLCache(keep_ratio=0.25)):
        layers = views if keep_all.keep_ratio == 1 else densities(0, 0)
        assert concluded(keep_all, layers)[0].note == ""


@given(st.integers(1, 300), st.integers(1, 300))
def test_a_larger_budget_takes_from_no_layer(one, other):
    views = densities(0, 4, 1e6)
    small, large = (
        counts_of(VLCache(keep_tokens=tokens, scorer=Norm()), views) for tokens in sorted([one, other])
    )
    assert all(few <= many for few, many in zip(small, large, strict=True))


def test_class_tokens_can_be_left_out_of_the_density():
    visibility = make_visibility([[[1]] * 3], 10)
    places = torch.zeros(1, 10, 2, dtype=torch.int64)
    is_class = torch.arange(10)[None] == 0
    base = make_view(visibility, layout_of=lambda: Layout(places, is_class))
    keys = base.keys * 0
    keys[:, :, 0] = 100
    view = make_view(visibility, keys=keys, captured_queries=base.queries.abs() + 1, layout_of=base.layout_of)
    assert VLCache().measure(view).tolist() == [[0.1]]
    assert VLCache(class_tokens="ignore").measure(view).tolist() == [[1.0]]
    no_class = make_view(visibility, layout_of=lambda: Layout(places))
    assert torch.equal(VLCache(class_tokens="ignore").measure(no_class), VLCache().measure(no_class))


@given(conversations(), ratios)
def test_a_sample_keeps_alone_what_it_keeps_in_a_batch(visibility, ratio):
    views = layers_over(visibility, dtype=torch.float32)
    policy = VLCache(keep_ratio=ratio, threshold=0.5)
    together = kept_by_layer(policy, views)
    for sample in range(visibility.batch):
        by_itself = kept_by_layer(policy, [alone(view, sample) for view in views])
        assert [layer[0] for layer in by_itself] == [layer[sample] for layer in together]


def test_it_ranks_by_what_all_rows_give():
    assert kvprune.get_policy("vlcache") == VLCache(scorer=H2O(normalize=False), keep_ratio=0.5)
    assert VLCache(scorer=Norm()).needs == {"queries"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vlcache:threshold=0", r"threshold of policy 'vlcache' .*\(0, 1\], got 0\.0"),
        ("vlcache:threshold=1.1", r"got 1\.1"),
        ("vlcache:class_tokens=drop", "count | ignore"),
        ("vlcache:scorer=h2o(keep_ratio=0.2)", "sets keep_ratio"),
    ],
)
def test_bad_options_are_refused(spec, message):
    with pytest.raises(PolicyOptionError, match=message):
        kvprune.get_policy(spec)
