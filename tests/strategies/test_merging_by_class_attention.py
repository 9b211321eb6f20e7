"""What `visionzip` and `prumerge` share: dropped patches merge into similar ones, whatever is kept."""

import dataclasses
import math

import pytest
import torch
from class_tokens import make_seen, members_of
from helpers import conversations, kept_sets, make_visibility, one_of
from hypothesis import given
from hypothesis import strategies as st
from kvprune_strategies import PruMerge, VisionZip

from kvprune.errors import BudgetError, ScoreError
from kvprune.tokens.merging import merge_features

ratios = st.integers(1, 100).map(lambda percent: percent / 100)
policies = st.one_of(
    st.builds(
        VisionZip,
        keep_ratio=ratios,
        dominant=st.sampled_from([0.01, 0.5, 0.84, 1.0]),
        merge=st.sampled_from(["avg", "sum"]),
    ),
    st.builds(PruMerge, keep_ratio=st.one_of(st.none(), ratios), plus=st.booleans()),
)


@given(
    conversations(),
    st.one_of(st.none(), ratios),
    st.sampled_from([VisionZip(dominant=0.5), PruMerge(merge="avg")]),
)
def test_merging_identical_tokens_by_their_mean_changes_nothing(visibility, ratio, policy):
    view = make_seen(visibility, captured_features=torch.full((visibility.batch, visibility.columns, 3), 0.3))
    policy = dataclasses.replace(policy, keep_ratio=ratio)
    onward = policy.choose(view).onward
    if onward.merge is not None:
        entries = onward.indices.shape[-1]
        merged = merge_features(view.features, onward.merge.into[:, 0], onward.merge.weights[:, 0], entries)
        assert torch.allclose(merged[onward.valid[:, 0]], torch.tensor(0.3), rtol=0, atol=1e-6)


@given(conversations(), policies)
def test_keeping_all_merges_nothing(visibility, policy):
    policy = dataclasses.replace(policy, keep_ratio=1.0)
    assert policy.choose(make_seen(visibility)).onward.merge is None


@given(conversations(), ratios, ratios, policies, st.booleans())
def test_a_larger_budget_keeps_a_superset(visibility, one, other, policy, classes):
    view = make_seen(visibility, classes=classes)
    few, many = (
        dataclasses.replace(policy, keep_ratio=ratio).choose(view).onward.to_mask()
        for ratio in sorted([one, other])
    )
    assert not bool((few & ~many).any())


@given(conversations(), policies, st.booleans())
def test_a_sample_keeps_alone_what_it_keeps_in_a_batch(visibility, policy, classes):
    view = make_seen(visibility, classes=classes)
    together = policy.choose(view).onward
    for sample in range(visibility.batch):
        assert members_of(policy.choose(one_of(view, sample)).onward, 0) == members_of(together, sample)


@pytest.mark.parametrize("cls", [VisionZip, PruMerge])
def test_equal_attention_goes_to_the_lower_column(cls):
    view = make_seen(make_visibility([[[1]]], 8), captured_class_attention=torch.full((1, 8), 0.125))
    policy = cls(keep_tokens=3, dominant=1.0) if cls is VisionZip else cls(keep_tokens=3)
    assert kept_sets(policy.choose(view).onward) == [[{0, 1, 2}]]


@pytest.mark.parametrize("cls", [VisionZip, PruMerge])
def test_attention_that_is_not_a_number_is_refused(cls):
    view = make_seen(make_visibility([[[1]]], 8))
    broken = view.class_attention.index_fill(1, torch.tensor([3]), math.nan)
    with pytest.raises(ScoreError, match="NaN for 1 tokens"):
        cls().choose(view.capturing(class_attention=broken))


@pytest.mark.parametrize("cls", [VisionZip, PruMerge])
def test_impossible_budgets_are_refused(cls):
    with pytest.raises(BudgetError, match="lies in"):
        cls(keep_ratio=2.0)
    with pytest.raises(BudgetError, match=r"either keep_ratio or keep_tokens, got keep_ratio=0\.5 and keep"):
        cls(keep_ratio=0.5, keep_tokens=3)
