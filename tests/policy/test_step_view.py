"""`StepView.best`, against sorting in plain Python; and the policy in docs/write-a-policy.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from families import inputs_of, model_of
from hypothesis import given, settings
from hypothesis import strategies as st
from stepping import against_oracle

from kvprune import StepView


def view(readable, keys):
    rows, _, entries = readable.shape
    return StepView(
        queries_of=lambda: torch.zeros(rows, 2, 3),
        text_rows=rows,
        keys=keys,
        values=keys,
        slots_of=lambda: torch.arange(entries).expand(len(keys), 1, -1),
        readable_of=lambda: readable,
        number_of=lambda: torch.zeros((), dtype=torch.int64),
        taken=0,
        layer_idx=3,
        rank=0,
        num_layers=1,
        scaling=1.0,
        copies=rows // len(keys),
        unrestricted=bool(readable.all()),
    )


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 12), st.booleans(), st.integers(0, 999))
def test_best_takes_the_highest_scores_and_the_lower_place_of_ties(rows, entries, count, limited, seed):
    random = torch.Generator().manual_seed(seed)
    scores = torch.randint(3, (rows, 2, entries), generator=random).double()  # many ties
    readable = torch.rand(rows, 1, entries, generator=random) < 0.7
    readable[..., seed % entries] = True
    if seed % 2:
        readable[:] = True
    limit = 1 + torch.randint(entries, (rows,), generator=random) if limited else None
    found = view(readable, torch.zeros(1, 2, entries, 3)).best(scores, count, limit)
    assert found.indices.shape == (rows, 2, min(count, entries))
    for row in range(rows):
        for head in range(2):
            order = sorted(
                readable[row, 0].nonzero().squeeze(1).tolist(),
                key=lambda place: (-float(scores[row, head, place]), place),
            )
            most = count if limit is None else min(count, int(limit[row]))
            wanted = sorted(order[:most])
            places, valid = found.indices[row, head].tolist(), found.valid[row, head].tolist()
            assert places[: len(wanted)] == wanted
            assert valid == [True] * len(wanted) + [False] * (len(places) - len(wanted))
            assert set(places[len(wanted) :]) <= {wanted[-1]}  # padding repeats the last


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 7),
    st.integers(1, 45),
    st.booleans(),
    st.integers(0, 999),
)
def test_best_pages_are_those_of_best(rows, entries, page, count, whole, seed):
    random = torch.Generator().manual_seed(seed)
    scores = torch.randint(4, (rows, 2, -(-entries // page)), generator=random).double()  # many ties
    readable = torch.rand(rows, 1, entries, generator=random) < 0.7
    readable[..., seed % entries] = True
    if whole:
        readable[:] = True
    step = view(readable, torch.zeros(rows, 2, entries, 3))
    limit = None if seed % 3 else torch.randint(1, count + 1, (rows,), generator=random)
    found = step.best_pages(scores, page, count, limit)
    expected = step.best(scores.repeat_interleave(page, -1)[..., :entries], count, limit)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.valid, expected.valid)
    assert step.has_made(found)
    assert step.has_limited(found) == (limit is not None)


def test_rows_and_what_is_held():
    step = view(
        torch.ones(6, 1, 4, dtype=torch.bool), torch.arange(2.0)[:, None, None, None].expand(2, 2, 4, 3)
    )
    assert step.rows.tolist() == [0, 0, 0, 1, 1, 1]
    assert step.of_rows(step.keys)[:, 0, 0, 0].tolist() == [0, 0, 0, 1, 1, 1]
    assert step.grouped_queries().shape == (6, 2, 1, 3)


def test_the_policy_in_the_document_runs():
    page = (Path(__file__).parents[2] / "docs" / "write-a-policy.md").read_text("utf-8")
    code = re.search(r"<!-- test: step -->\n```python\n(.*?)```", page, re.DOTALL)[1]
    space = {"__name__": "example"}
    exec(compile(code, "write-a-policy.md", "exec", dont_inherit=True), space)
    policy = space["Nearest"](count=3)
    for family in ("Mllama", "BART"):
        assert against_oracle(model_of(family), inputs_of(family), policy) <= 1e-6
