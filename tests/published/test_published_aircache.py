"""`aircache` against selections of a transcription of the published rule; there is no code of the authors."""

import pytest
import torch
from helpers import kept_sets, make_view, make_visibility
from published import draw, load

import kvprune
from kvprune.policy.text_view import TextView


@pytest.mark.parametrize("case", load("aircache"), ids=str)
def test_aircache_keeps_what_the_transcription_keeps(case):
    problem, views = case.problem, []
    heads, rows, width, columns = (problem[name] for name in ("heads", "rows", "width", "columns"))
    for rank in range(problem["layers"]):

        def drawn(number, count, seed=problem["seed"] + 10 * rank):
            return draw(seed + number, 1, heads, count, width, dtype=torch.float64)

        keys = drawn(3, columns)
        text = TextView(
            queries=problem["sharpness"] * drawn(0, rows),
            keys=drawn(1, rows),
            values=drawn(1, rows),
            real=torch.ones(1, rows, dtype=torch.bool),
            scaling=width**-0.5,
        )
        views.append(
            make_view(
                make_visibility([[[1]] * rows], columns),
                width=width,
                rank=rank,
                num_layers=problem["layers"],
                keys=keys,
                values=keys,
                captured_queries=(1 + rank) * drawn(2, rows),
                captured_text=text,
            )
        )
    policy = kvprune.get_policy(case.spec)
    decisions = policy.conclude(views, [policy.observe(view) for view in views])
    assert [kept_sets(decision.cache)[0][0] for decision in decisions] == [set(kept) for kept in case.kept]
