"""`kvzip`: the largest attention of a reconstruction ranks pairs of all heads and layers together."""

from __future__ import annotations

import pytest
import torch
from helpers import conversations, exact_budget, kept_sets, make_view, slow_groups
from hypothesis import given
from hypothesis import strategies as st
from kvprune_strategies import KVzip

import kvprune
from kvprune.errors import BudgetError, PolicyOptionError
from kvprune.testing.reference import slow_decode

ratios = st.integers(1, 1000).map(lambda thousandths: thousandths / 1000)
LAYERS = 3


def views_of(visibility, seed):
    random = torch.Generator().manual_seed(seed)
    return [
        make_view(
            visibility,
            rank=rank,
            captured_queries=None,
            captured_reconstruction=torch.rand(
                visibility.batch, 2, visibility.columns, generator=random, dtype=torch.float64
            ),
        )
        for rank in range(LAYERS)
    ]


def slow_choice(views, sample, ratio, members):
    """Pairs (layer, head, column): first the best of each group in each head, then the highest of all."""
    visibility = views[0].visibility
    visible = slow_decode(visibility, sample)
    groups = [group & visible for group in slow_groups(visibility, sample)]
    score = {
        (layer, head, column): float(views[layer].reconstruction[sample, head, column])
        for layer, head in members
        for column in visible
    }
    kept = {
        max(((layer, head, column) for column in group), key=score.__getitem__)
        for layer, head in members
        for group in groups
        if group
    }
    most = max(exact_budget(ratio, len(visible)) * len(members), len(kept))
    for pair in sorted(set(score) - kept, key=lambda pair: -score[pair]):
        if len(kept) < most:
            kept.add(pair)
    return kept


SHARES = {
    "model": [[(layer, head) for layer in range(LAYERS) for head in range(2)]],
    "layer": [[(layer, head) for head in range(2)] for layer in range(LAYERS)],
    "head": [[(layer, head)] for layer in range(LAYERS) for head in range(2)],
}


@pytest.mark.parametrize("share", SHARES)
@given(visibility=conversations(), ratio=ratios, seed=st.integers(0, 99))
def test_the_highest_pairs_stay(share, visibility, ratio, seed):
    views = views_of(visibility, seed)
    policy = KVzip(keep_ratio=ratio, share=share)
    decisions = policy.conclude(views, [policy.observe(view) for view in views])
    for sample in range(visibility.batch):
        if not slow_decode(visibility, sample):
            continue
        expected = set().union(*(slow_choice(views, sample, ratio, one) for one in SHARES[share]))
        got = {
            (layer, head, column)
            for layer, decision in enumerate(decisions)
            for head, columns in enumerate(kept_sets(decision.cache)[sample])
            for column in columns
        }
        # A budget below one pair for each head and image is raised head by head in `head` alone.
        assert got == expected


def test_options():
    assert KVzip().exact_budget == kvprune.Budget(keep_ratio=0.5)
    assert KVzip().needs == {"reconstruction"}
    assert not KVzip.reads_answer
    assert [KVzip(share=share).budget_scope for share in SHARES] == list(SHARES)
    policy = kvprune.get_policy("kvzip:prompt_ids=5 17,max_new_tokens=9")
    assert policy.reconstructs_from.prompt_ids == (5, 17)
    assert kvprune.get_policy(str(policy.spec)) == policy
    with pytest.raises(PolicyOptionError, match="got 'five'"):
        kvprune.get_policy("kvzip:prompt_ids=five")
    with pytest.raises(PolicyOptionError, match="1 or more, got 0"):
        kvprune.get_policy("kvzip:max_new_tokens=0")
    with pytest.raises(PolicyOptionError, match=r"share.*'all'"):
        kvprune.get_policy("kvzip:share=all")
    with pytest.raises(BudgetError, match="got 0"):
        KVzip(keep_ratio=0.0)
