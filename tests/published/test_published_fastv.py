"""`fastv` against selections of the authors' code."""

import pytest
import torch
from helpers import kept_sets, make_view, make_visibility
from published import draw, load

import kvprune


@pytest.mark.parametrize("case", load("fastv"), ids=str)
def test_fastv_keeps_what_the_authors_code_keeps(case):
    problem = case.problem
    heads, rows, width, columns = (problem[name] for name in ("query_heads", "rows", "width", "columns"))
    policy = kvprune.get_policy(case.spec)
    for rank in range(problem["layers"]):
        seed = problem["seed"] + 10 * rank
        keys = draw(seed, 1, problem["kv_heads"], columns, width, dtype=torch.float64)
        view = make_view(
            make_visibility([[[1]] * rows], columns),
            width=width,
            rank=rank,
            num_layers=problem["layers"],
            keys=keys,
            values=keys,
            captured_queries=draw(seed + 1, 1, heads, rows, width, dtype=torch.float64),
        )
        decision = policy.select(view)
        assert decision.cache is None
        if rank == problem["rank"]:
            assert kept_sets(decision.onward) == [[set(case.kept)]]
        else:
            assert decision.onward is None
