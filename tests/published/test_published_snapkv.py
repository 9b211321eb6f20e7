"""`snapkv` keeps what the authors' code keeps, at its published settings."""

import pytest
from attention_problems import layer_view
from helpers import kept_sets
from published import load

import kvprune


@pytest.mark.parametrize("case", load("snapkv"), ids=str)
def test_the_same_tokens_as_the_published_code(case):
    policy = kvprune.get_policy(case.spec)
    assert kept_sets(policy.select(layer_view(case.problem)).cache) == [[set(head) for head in case.kept]]
