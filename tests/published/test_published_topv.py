"""`topv` against recorded selections of a third-party port; there is no code of the authors."""

import pytest
from helpers import kept_sets, make_features, make_visibility
from published import draw, load

import kvprune


@pytest.mark.parametrize("case", load("topv"), ids=str)
def test_topv_keeps_what_the_port_keeps(case):
    side, width = case.problem["side"], case.problem["width"]
    features = draw(case.problem["seed"], side * side, width)[None]
    view = make_features(make_visibility([[[1]]], side * side), grid=side, captured_features=features)
    assert kept_sets(kvprune.get_policy(case.spec).choose(view).onward) == [[set(case.kept)]]
