"""`visionzip` and `prumerge` against selections of the authors' code."""

import pytest
import torch
from class_tokens import make_seen, members_of
from helpers import kept_sets, make_visibility
from published import draw, load

import kvprune
from kvprune import Layout


def view_of(paid, features):
    """A view of one image of one tile, its class token first; ``paid`` is the attention to its patches."""
    columns = len(paid) + 1
    paid = torch.cat([paid.new_zeros(1), paid / paid.sum()])[None]
    first = (torch.arange(columns) == 0)[None]
    layout = Layout(Layout.line(columns).places, first)
    return make_seen(
        make_visibility([[[1]]], columns),
        captured_class_attention=paid,
        captured_features=features[None],
        layout_of=lambda: layout,
    )


@pytest.mark.parametrize("case", load("visionzip"), ids=str)
def test_visionzip_keeps_and_merges_what_the_authors_code_does(case):
    seed, patches = case.problem["seed"], case.problem["patches"]
    logits = draw(seed, case.problem["heads"], patches + 1, dtype=torch.float64)
    paid = (case.problem["sharpness"] * logits).softmax(-1).sum(0)[1:]
    # The original compares the encoder's keys and merges hidden states; here features are both.
    view = view_of(paid, draw(seed + 1, patches + 1, case.problem["width"], dtype=torch.float64))
    onward = kvprune.get_policy(case.spec).choose(view).onward
    targets = {target for target, *_ in case.kept["merged"]}
    assert kept_sets(onward) == [[set(case.kept["dominant"]) | targets]]
    members = members_of(onward, 0)
    for target, *joined in case.kept["merged"]:
        others = {column: 1 / len(joined) for column in joined}
        assert members.pop(target) == pytest.approx({target: 1.0, **others})
    assert members == {column: {column: 1.0} for column in case.kept["dominant"]}


@pytest.mark.parametrize("case", load("prumerge"), ids=str)
def test_prumerge_keeps_what_the_authors_code_keeps(case):
    seed, columns, width = case.problem["seed"], case.problem["patches"] + 1, case.problem["width"]
    query = case.problem["sharpness"] * draw(seed, columns, width, dtype=torch.float64)[0]
    keys = draw(seed + 1, columns, width, dtype=torch.float64)
    paid = (keys @ query * width**-0.5).softmax(-1)[1:]
    view = view_of(paid, draw(seed + 2, columns, width, dtype=torch.float64))
    assert kept_sets(kvprune.get_policy(case.spec).choose(view).onward) == [[set(case.kept)]]
