"""`cdpruner` selects what the authors' code selects, relevance being given."""

import pytest
import torch
from helpers import kept_sets, make_view, make_visibility
from published import draw, load

import kvprune


@pytest.mark.parametrize("case", load("cdpruner"), ids=str)
def test_cdpruner_selects_the_recorded_tokens(case):
    problem = case.problem
    features = draw(problem["seed"], 1, problem["tokens"], problem["width"], dtype=torch.float32)
    view = make_view(
        make_visibility([[[1]] * problem["rows"]], problem["tokens"]),
        seed=problem["seed"],
        captured_features=features,
    )
    policy = kvprune.get_policy(case.spec)
    assert kept_sets(policy.select(view).onward) == [[set(case.kept)]]
