"""`guided` against selections of the authors' code, from the guide's attention to what the target keeps."""

import pytest
import torch
from helpers import kept_sets, make_view, make_visibility
from published import draw, load

import kvprune
from kvprune import FeatureView
from kvprune.session.guide_policies import AttentionRecord


def importance(problem):
    """What the guide's attention from prompt and answer adds up to, as `kvprune.Guide` does it."""
    heads, width, rows = problem["heads"], problem["width"], problem["prompt"] + problem["answer"]
    record = AttentionRecord(problem["prompt"])
    for layer in range(problem["guide_layers"]):
        seed = problem["seed"] + 10 * layer
        keys = draw(seed + 1, 1, heads, problem["columns"], width, dtype=torch.float64)
        queries = draw(seed, 1, heads, rows, width, dtype=torch.float64)
        visibility = make_visibility([[[1]] * rows], problem["columns"])
        record.add(
            make_view(visibility, width=width, keys=keys, values=keys, captured_queries=queries, rank=layer)
        )
    return record.sums(1, by_mean=False)[0]


@pytest.mark.parametrize("case", load("guided"), ids=str)
def test_guided_keeps_what_the_authors_code_keeps(case):
    policy, problem = kvprune.get_policy(case.spec), case.problem
    scores, decisions = importance(problem), []
    for rank in range(problem["layers"]):
        view = make_view(
            make_visibility([[[1]] * problem["prompt"]], problem["columns"]),
            rank=rank,
            num_layers=problem["layers"],
            captured_guidance=scores,
        )
        if rank == 0:
            before = FeatureView(**{name: getattr(view, name) for name in FeatureView.__dataclass_fields__})
            decisions.append(policy.choose(before))
        decisions.append(policy.select(view))
    made = [number for number, decision in enumerate(decisions) if decision.onward is not None]
    assert made == [case.kept["whole"]]  # after the last layer that stays whole, or before the first
    assert kept_sets(decisions[made[0]].onward) == [[set(case.kept["columns"])]]
