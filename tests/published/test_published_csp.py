"""`csp` keeps of the image and of the text what the authors' code keeps."""

import pytest
import torch
from attention_problems import layer_view
from helpers import kept_sets
from published import draw, load

import kvprune
from kvprune import TextView


def text_view(problem):
    """The text's own layer: the same queries, and keys of the text."""
    queries = layer_view(problem).queries
    keys = draw(problem["text_seed"], problem["kv_heads"], problem["rows"], problem["width"])[None]
    return TextView(
        queries=queries,
        keys=keys,
        values=keys,
        real=torch.ones(1, problem["rows"], dtype=torch.bool),
        scaling=problem["scaling"],
        image_tokens=torch.tensor([problem["columns"]]),
    )


@pytest.mark.parametrize("case", load("csp"), ids=str)
def test_the_same_tokens_and_entries_as_the_published_code(case):
    policy, text = kvprune.get_policy(case.spec), text_view(case.problem)
    view = layer_view(case.problem, num_layers=1, captured_text=text)
    assert kept_sets(policy.select(view).cache) == [[set(head) for head in case.kept["image"]]]
    assert kept_sets(policy.select_text(text)) == [[set(head) for head in case.kept["text"]]]
