"""`pyramid` keeps in each layer what the authors' code keeps, at its published settings."""

import pytest
from attention_problems import layer_view
from published import load
from sharing import kept_by_layer

import kvprune


@pytest.mark.parametrize("case", load("pyramid"), ids=str)
def test_the_same_tokens_as_the_published_code(case):
    policy = kvprune.get_policy(case.spec)
    layers = range(len(case.problem["layer_seeds"]))
    views = [layer_view(case.problem, layer, num_layers=len(layers)) for layer in layers]
    assert kept_by_layer(policy, views) == [[[set(head) for head in layer]] for layer in case.kept]
