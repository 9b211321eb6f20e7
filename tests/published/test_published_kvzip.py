"""`kvzip` keeps what the authors' code and its port keep, given the queries of a reconstruction pass."""

import pytest
from layers import attention, selections, views
from published import load

import kvprune


@pytest.mark.parametrize("case", load("kvzip"), ids=str)
def test_the_same_pairs_as_the_published_code(case):
    layers = []
    for view in views(case.problem):
        peak = view.attention_peak().unflatten(1, (view.heads, -1)).amax(2)  # [1, Hkv, S]
        plain = attention(case.problem, view.rank).amax(2).unflatten(1, (view.heads, -1)).amax(2)
        assert (peak - plain).abs().max() < 1e-12
        layers.append(view.capturing(reconstruction=peak))
    assert selections(kvprune.get_policy(case.spec), layers) == case.kept
