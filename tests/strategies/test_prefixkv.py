"""`prefixkv` against its definition with plain loops: one part of attention that all layers keep."""

import math

import pytest
import torch
from helpers import alone, conversations, exact_budget, make_view, make_visibility, slow_attention
from hypothesis import given
from hypothesis import strategies as st
from kvprune_strategies import Norm, PrefixKV
from sharing import (
    best_of,
    concluded,
    counts_of,
    groups_of,
    kept_by_layer,
    layers_over,
    share_out,
    visible_of,
)

import kvprune
from kvprune.errors import BudgetError, PolicyOptionError
from kvprune.scoring.apportionment import apportion

ratios = st.integers(1, 100).map(lambda percent: percent / 100)


def slow_mass(view, sample):
    """Attention of each column, mean over query heads."""
    heads = [slow_attention(view, sample, head) for head in range(4)]
    return [math.fsum(column) / 4 for column in zip(*heads, strict=True)]


@given(conversations(), ratios, st.integers(0, 3))
def test_each_layer_keeps_its_best_tokens_up_to_one_part_of_attention(visibility, ratio, seed):
    views = layers_over(visibility, seed)
    kept = kept_by_layer(PrefixKV(keep_ratio=ratio), views)
    for sample in range(visibility.batch):
        visible = visible_of(visibility, sample)
        mass = [slow_mass(view, sample) for view in views]
        ranked = [sorted((of[column] for column in visible), reverse=True) for of in mass]

        def less_is_more(layer, place, ranked=ranked):
            return -math.fsum(ranked[layer][:place]) / (math.fsum(ranked[layer]) or 1)

        even = exact_budget(ratio, len(visible))
        counts = share_out(less_is_more, [1] * 3, [len(visible)] * 3, 3 * even)
        for layer, count in enumerate(counts):
            assert kept[layer][sample] == [best_of(mass[layer], visible, count)]


@given(conversations(max_batch=1), ratios, st.integers(0, 3))
def test_what_every_layer_holds_is_about_the_same_part(visibility, ratio, seed):
    """Bisection would find a p; every layer holds at least p, and would not without its last token."""
    views = layers_over(visibility, seed)
    visible = visible_of(visibility, 0)
    parts = []
    for view, layer in zip(views, kept_by_layer(PrefixKV(keep_ratio=ratio), views), strict=True):
        mass = slow_mass(view, 0)
        total = math.fsum(mass[column] for column in visible) or 1
        held = sorted((mass[column] / total for column in layer[0][0]), reverse=True)
        parts.append((math.fsum(held[:-1]), math.fsum(held), len(held)))
    if any(count > 1 for _, _, count in parts):
        assert max(without for without, _, count in parts if count > 1) <= min(p for _, p, _ in parts) + 1e-4


def test_a_token_counts_by_what_the_better_ones_hold_and_not_by_its_own():
    """After one token each, 0.6 and 0.5 are held: the second is behind, whatever its next one has."""
    counts = apportion(
        PrefixKV().urgency(torch.tensor([[[0.6, 0.2, 0.2], [0.5, 0.45, 0.05]]]), torch.tensor([[3, 3]]), 3),
        *(torch.tensor([[bound] * 2]) for bound in (1, 3)),
        torch.tensor([3]),
    )
    assert counts.tolist() == [[1, 2]]


def test_small_remainders_are_told_apart():
    """Both layers give nearly all to their best token; only what is left says where tokens are wanted."""
    left = torch.tensor([[1e-12, 1e-12, 1e-12], [4e-12, 1e-13, 1e-14]], dtype=torch.float64)
    measured = torch.cat([1 - left.sum(-1, keepdim=True), left], dim=-1)[None]  # [1, 2, 4]
    urgency = PrefixKV().urgency(measured, torch.tensor([[4, 4]]), 4)
    torch.testing.assert_close(urgency[0, 0, 1:], torch.tensor([3e-12, 2e-12, 1e-12], dtype=torch.float64))
    torch.testing.assert_close(urgency[0, 1, 1], torch.tensor(4.11e-12, dtype=torch.float64))
    one, all_ = torch.tensor([[1, 1]]), torch.tensor([[4, 4]])
    found = [apportion(urgency, one, all_, torch.tensor([total]))[0].tolist() for total in range(2, 9)]
    assert found == [[1, 1], [1, 2], [2, 2], [3, 2], [4, 2], [4, 3], [4, 4]]


def test_equal_layers_keep_equally_many_and_the_total_is_exact():
    view = make_view(make_visibility([[[1]] * 3], 30))
    for tokens in (1, 7, 12, 30):
        assert counts_of(PrefixKV(keep_tokens=tokens), [view] * 3) == [tokens] * 3


def test_a_layer_that_looks_at_few_tokens_leaves_its_share_to_the_others():
    visibility = make_visibility([[[1]] * 2], 40)
    sharp = make_view(visibility)
    sharp = make_view(visibility, keys=sharp.keys * 20)
    flat = make_view(visibility, keys=sharp.keys * 0)
    few, many = counts_of(PrefixKV(keep_ratio=0.5), [sharp, flat])
    assert few + many == 40
    assert few < 10


def test_it_ends_where_bisection_does_not():
    """32 equal layers: the published search never meets a total between two multiples of 32."""
    view = make_view(make_visibility([[[1]]], 20))
    assert sum(counts_of(PrefixKV(keep_tokens=7), [view] * 32)) == 7 * 32


@given(conversations(), ratios, st.integers(0, 2))
def test_a_scorer_chooses_tokens_and_changes_no_budget(visibility, ratio, seed):
    views = layers_over(visibility, seed)
    own = kept_by_layer(PrefixKV(keep_ratio=ratio), views)
    other = kept_by_layer(PrefixKV(keep_ratio=ratio, scorer=Norm()), views)
    for layer in range(3):
        norms = views[layer].values.norm(dim=-1).tolist()
        for sample in range(visibility.batch):
            (tokens,) = own[layer][sample]
            visible = visible_of(visibility, sample)
            for head in range(2):
                expected = best_of(norms[sample][head], visible, len(tokens))
                assert other[layer][sample][head] == expected


@given(conversations(), ratios)
def test_a_sample_keeps_alone_what_it_keeps_in_a_batch(visibility, ratio):
    views = layers_over(visibility, dtype=torch.float32)
    together = kept_by_layer(PrefixKV(keep_ratio=ratio), views)
    for sample in range(visibility.batch):
        by_itself = kept_by_layer(PrefixKV(keep_ratio=ratio), [alone(view, sample) for view in views])
        assert [layer[0] for layer in by_itself] == [layer[sample] for layer in together]


def test_several_images_keep_a_token_each_in_every_layer():
    visibility = make_visibility([[[1, 1, 1]] * 2], 4, images=[0, 1, 2])
    views = layers_over(visibility)
    assert groups_of(visibility, 0) == 3
    for layer in kept_by_layer(PrefixKV(keep_tokens=1), views):
        assert sorted(column // 4 for column in layer[0][0]) == [0, 1, 2]


def test_nothing_is_noted_and_queries_are_needed():
    views = layers_over(make_visibility([[[1]]], 9))
    assert [decision.note for decision in concluded(PrefixKV(), views)] == [""] * 3
    assert PrefixKV().needs == {"queries"}
    assert PrefixKV(scorer=Norm(of="raw_keys")).needs == {"queries", "raw_keys"}


@given(conversations(), ratios, st.integers(0, 2))
def test_given_shares_replace_what_a_sample_measures(visibility, ratio, seed):
    views = layers_over(visibility, seed)
    shares = (0.6, 0.3, 0.1)
    kept = kept_by_layer(kvprune.get_policy(f"prefixkv:shares=0.6/0.3/0.1,keep_ratio={ratio}"), views)
    for sample in range(visibility.batch):
        visible = visible_of(visibility, sample)
        most, even = [len(visible)] * 3, exact_budget(ratio, len(visible))
        counts = share_out(lambda layer, place: shares[layer] / (place + 0.5), [1] * 3, most, 3 * even)
        for layer, count in enumerate(counts):
            assert kept[layer][sample] == [best_of(slow_mass(views[layer], sample), visible, count)]


@pytest.mark.parametrize("shares", ["x", "1/x", "-1/2", "0/0", "1//2", "nan/1", "inf/1", "/"])
def test_shares_that_are_no_numbers_are_refused(shares):
    with pytest.raises(
        PolicyOptionError, match="shares of policy 'prefixkv' are numbers that are not negative"
    ):
        PrefixKV(shares=shares)


def test_shares_for_another_number_of_layers_are_refused():
    views = layers_over(make_visibility([[[1]]], 9))
    with pytest.raises(
        PolicyOptionError, match=r"one number for each .* this model has 3, got 2: '0\.5/0\.5'"
    ):
        concluded(PrefixKV(shares="0.5/0.5"), views)


def test_bad_options_are_refused():
    with pytest.raises(BudgetError, match="keep_ratio"):
        kvprune.get_policy("prefixkv:keep_ratio=0")
    with pytest.raises(PolicyOptionError, match="sets keep_ratio"):
        kvprune.get_policy("prefixkv:scorer=norm(keep_ratio=0.1)")
