"""`divprune` selects what the authors' code selects, in the same order."""

import pytest
import torch
from helpers import kept_sets, make_features, make_visibility
from published import draw, load

import kvprune


@pytest.mark.parametrize("case", load("divprune"), ids=str)
def test_divprune_selects_the_recorded_tokens(case):
    problem = case.problem
    vectors = draw(
        problem["seed"], problem["tokens"], problem["width"], dtype=getattr(torch, problem["dtype"])
    )
    view = make_features(make_visibility([[[1]]], problem["tokens"]), captured_features=vectors[None])
    policy = kvprune.get_policy(case.spec)
    assert kept_sets(policy.choose(view).onward) == [[set(case.kept)]]
    for count in (1, 2, len(case.kept) // 2):  # the order of picking is the ranking
        few = kvprune.get_policy(f"divprune:keep_tokens={count}")
        assert kept_sets(few.choose(view).onward) == [[set(case.kept[:count])]]
