"""`pyramid` against its line, computed with plain fractions."""

from fractions import Fraction

import pytest
import torch
from helpers import alone, conversations, make_view, make_visibility
from hypothesis import given
from hypothesis import strategies as st
from kvprune_strategies import Norm, Pyramid, SnapKV
from sharing import best_of, concluded, counts_of, kept_by_layer, layers_over, visible_of

import kvprune
from kvprune.errors import PolicyOptionError

shapes = st.sampled_from(["pyramid", "inverted"])


def line(mean, visible, layers, beta, shape="pyramid"):
    """Shares of the layers before rounding, as the published code has them, without a window."""
    mean = Fraction(mean)
    low = mean / Fraction(beta)
    high = 2 * mean - low
    if high > visible:
        high, low = Fraction(visible), 2 * mean - visible
    if layers == 1:
        return [mean]
    shares = [high - layer * (high - low) / (layers - 1) for layer in range(layers)]
    return shares if shape == "pyramid" else shares[::-1]


def counts_at(tokens, columns=40, layers=8, **options):
    view = make_view(make_visibility([[[1]]], columns))
    return counts_of(Pyramid(keep_tokens=tokens, scorer=Norm(), **options), [view] * layers)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 60), shapes)
def test_every_layer_keeps_its_share_rounded_and_all_together_the_budget(tokens, layers, beta, shape):
    counts = counts_at(tokens, layers=layers, beta=beta, shape=shape)
    assert sum(counts) == layers * tokens
    shares = line(tokens, 40, layers, beta, shape)
    # One token at least may cost the others a part of one each.
    slack = sum(max(0, 1 - share) for share in shares) + 1
    assert all(abs(count - share) < slack for count, share in zip(counts, shares, strict=True))
    assert counts == sorted(counts, reverse=shape == "pyramid")


@given(st.integers(4, 36), st.integers(2, 9), st.integers(1, 60))
def test_the_line_is_met_where_its_shares_are_whole(step, layers, beta):
    """Budgets at which all shares are whole numbers need no rounding."""
    for tokens in range(1, 41):
        shares = line(tokens, 40, layers, beta)
        if all(share == int(share) >= 1 for share in shares):
            assert counts_at(tokens, layers=layers, beta=beta) == shares


def test_the_published_line():
    # 20 tokens to a layer on average: 39 in the first layer, 1 in the last.
    assert counts_at(20, columns=100, layers=3, beta=20) == [39, 20, 1]
    assert counts_at(20, columns=100, layers=3, beta=20, shape="inverted") == [1, 20, 39]
    # Of 30 tokens, the first layer keeps all, and the line turns about it.
    assert counts_at(20, columns=30, layers=3, beta=20) == [30, 20, 10]


def test_a_beta_of_one_is_uniform_and_a_larger_one_is_steeper():
    assert counts_at(13, beta=1) == [13] * 8
    first = [counts_at(13, beta=beta)[0] for beta in (1, 1.2, 2, 5, 20)]
    assert first == sorted(first)
    assert len(set(first)) == 5


def test_one_layer_keeps_the_budget():
    assert counts_at(13, layers=1) == [13]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), shapes)
def test_a_larger_budget_takes_from_no_layer(one, other, layers, shape):
    small, large = (counts_at(tokens, layers=layers, shape=shape) for tokens in sorted([one, other]))
    assert all(few <= many for few, many in zip(small, large, strict=True))


@given(conversations(), st.integers(1, 100), st.integers(0, 2))
def test_a_layer_keeps_the_best_tokens_of_its_share(visibility, percent, seed):
    views = layers_over(visibility, seed)
    kept = kept_by_layer(Pyramid(keep_ratio=percent / 100, scorer=Norm()), views)
    for layer, view in enumerate(views):
        norms = view.values.norm(dim=-1).tolist()
        for sample in range(visibility.batch):
            counts = {len(head) for head in kept[layer][sample]}
            assert len(counts) == 1
            for head, tokens in enumerate(kept[layer][sample]):
                assert tokens == best_of(norms[sample][head], visible_of(visibility, sample), *counts)


@given(conversations(), st.integers(1, 100))
def test_a_sample_keeps_alone_what_it_keeps_in_a_batch(visibility, percent):
    policy = Pyramid(keep_ratio=percent / 100, scorer=SnapKV(pool="none"))
    views = layers_over(visibility, dtype=torch.float32)
    together = kept_by_layer(policy, views)
    for sample in range(visibility.batch):
        by_itself = kept_by_layer(policy, [alone(view, sample) for view in views])
        assert [layer[0] for layer in by_itself] == [layer[sample] for layer in together]


def test_it_ranks_as_snapkv_does_and_needs_what_that_needs():
    assert kvprune.get_policy("pyramid") == Pyramid(scorer=SnapKV(), keep_ratio=0.5)
    assert Pyramid().needs == {"queries"}
    assert Pyramid(scorer=Norm()).needs == frozenset()
    views = layers_over(make_visibility([[[1]]], 9))
    assert [decision.note for decision in concluded(Pyramid(), views)] == [""] * 3


def test_the_preset_is_the_published_setting():
    scorer = SnapKV(window=8, kernel=7, reduction="max")
    assert kvprune.get_policy("pyramid:preset=published") == Pyramid(beta=20, scorer=scorer)
    assert set(Pyramid.presets) == {"published"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pyramid:beta=0.5", r"beta of policy 'pyramid' is .*at least 1, got 0\.5"),
        ("pyramid:shape=cube", "must be pyramid | inverted, got 'cube'"),
        ("pyramid:scorer=full", "policy that ranks tokens"),
        ("pyramid:scorer=norm(keep_tokens=3)", "sets keep_tokens"),
    ],
)
def test_bad_options_are_refused(spec, message):
    with pytest.raises(PolicyOptionError, match=message):
        kvprune.get_policy(spec)
