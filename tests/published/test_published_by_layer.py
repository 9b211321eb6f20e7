"""Policies that decide at a layer, or after all layers, keep what recorded procedures kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import make_view, make_visibility
from layers import selections, views
from published import Case, load

import kvprune

KEEPING = ("expected", "keydiff", "norm", "prefixkv", "trim", "vatp", "vlcache")


def cases(*names: str) -> Any:
    """Run a test for each recorded case of some policies."""
    recorded = [pytest.param(case, id=str(case)) for name in names for case in load(name)]
    return pytest.mark.parametrize("case", recorded)


@cases(*KEEPING)
def test_the_same_tokens_stay(case: Case) -> None:
    assert selections(kvprune.get_policy(case.spec), views(case.problem)) == case.kept


@cases("zipvl")
def test_the_same_tokens_are_important(case: Case) -> None:
    """Important tokens are those that are held in more bits."""
    policy = kvprune.get_policy(case.spec)
    for view, expected in zip(views(case.problem), case.kept, strict=True):
        selection = policy.select(view).cache
        assert selection is not None
        assert selection.bits is not None
        assert selection.indices.shape[-1] == case.problem["columns"]  # the others are held in fewer
        high = selection.bits[0] == 4  # [Hkv, S]
        assert [of_head.nonzero().squeeze(1).tolist() for of_head in high] == expected


@cases("elastic")
def test_the_same_tokens_are_merged(case: Case) -> None:
    """One row, whose logits are the recorded ranks."""
    ranks = torch.tensor(case.problem["ranks"], dtype=torch.float64)
    heads = case.problem["heads"]
    keys = (ranks / len(ranks))[None, None, :, None].expand(1, heads, -1, 4)
    view = make_view(
        make_visibility([[[1]]], len(ranks)),
        query_heads=heads,
        kv_heads=heads,
        keys=keys,
        values=keys,
        captured_queries=torch.full((1, heads, 1, 4), 3.0, dtype=torch.float64),
    )
    selection = kvprune.get_policy(case.spec).select(view).cache
    assert selection is not None
    assert selection.merge is not None
    into = selection.merge.into[0, 0]
    buckets = [(into == entry).nonzero().squeeze(1).tolist() for entry in range(selection.indices.shape[-1])]
    assert selection.indices[0, 0].tolist() == case.kept["anchors"]
    assert buckets == case.kept["buckets"]
    sizes = torch.tensor([len(bucket) for bucket in buckets], dtype=torch.float64)
    torch.testing.assert_close(
        selection.merge.weights[0, 0], (1 / sizes)[into].to(selection.merge.weights.dtype)
    )
