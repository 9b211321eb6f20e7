"""`quest` against a slow version of its rule, in plain loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from families import MODELS, inputs_of, model_of
from generation import generate
from hypothesis import given, settings
from hypothesis import strategies as st
from stepping import against_oracle, recorded

import kvprune
from kvprune import StepView
from kvprune.errors import BudgetError, PolicyOptionError
from kvprune.policy import HeldView


def slow(keys, valid, queries, page, ratio):
    """Entries that each KV head reads, as sets; ``keys`` are [Hkv][K][D], ``queries`` [Hq][D]."""
    entries = [entry for entry in range(len(valid)) if valid[entry]]
    budget = math.ceil(round(ratio * len(entries), 9))
    group = len(queries) // len(keys)
    read = []
    for head, own in enumerate(keys):
        bounds = {}
        for number in range(math.ceil(len(valid) / page)):
            members = [entry for entry in entries if entry // page == number]
            if not members:
                continue
            bounds[number] = max(
                math.fsum(
                    max(q * max(own[e][c] for e in members), q * min(own[e][c] for e in members))
                    for c, q in enumerate(queries[head * group + one])
                )
                for one in range(group)
            )
        order = sorted(bounds, key=lambda number: (-bounds[number], number))
        wanted = [entry for number in order for entry in entries if entry // page == number]
        read.append(set(wanted[:budget]))
    return read


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.sampled_from([1, 2]),
    st.integers(1, 23),
    st.sampled_from([1, 3, 4, 16]),
    st.sampled_from([0.1, 0.3, 0.5, 0.9]),
    st.integers(0, 99),
)
def test_it_reads_what_the_slow_rule_reads(rows, copies, entries, page, ratio, seed):
    random = torch.Generator().manual_seed(seed)
    keys = torch.randn(rows, 2, entries, 3, generator=random, dtype=torch.float64)
    queries = torch.randn(rows * copies, 4, 3, generator=random, dtype=torch.float64)
    counts = torch.randint(1, entries + 1, (rows,), generator=random)
    counts[0] = entries  # as wide as the longest
    valid = (torch.arange(entries) < counts[:, None])[:, None]  # [R, 1, K]
    policy = kvprune.get_policy(f"quest:keep_ratio={ratio},page={page}")
    slots = torch.arange(entries).expand(rows, 1, -1)
    state = policy.prepare(
        HeldView(layer=None, keys=keys, values=keys, slots=slots, valid=valid, columns=entries)
    )
    step = StepView(
        queries_of=lambda: queries,
        text_rows=rows * copies,
        keys=keys,
        values=keys,
        slots_of=lambda: slots,
        readable_of=lambda: valid.repeat_interleave(copies, dim=0),
        number_of=lambda: torch.zeros((), dtype=torch.int64),
        taken=0,
        layer_idx=0,
        rank=0,
        num_layers=1,
        scaling=1.0,
        copies=copies,
    )
    read = policy.attend(step, {name: step.of_rows(tensor) for name, tensor in state.items()})
    for row in range(rows * copies):
        held = row // copies
        wanted = slow(keys[held].tolist(), valid[held, 0].tolist(), queries[row].tolist(), page, ratio)
        if read is None:
            assert all(len(head) == int(counts[held]) for head in wanted)
            continue
        for head in range(2):
            assert set(read.indices[row, head][read.valid[row, head]].tolist()) == wanted[head]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_equals_the_oracle(family, beams):
    for spec in ("quest:keep_ratio=0.3,page=4", "quest:keep_tokens=3,page=2"):
        assert against_oracle(model_of(family), inputs_of(family), spec, num_beams=beams) <= 1e-6


@pytest.mark.parametrize("family", MODELS)
def test_reading_everything_is_bit_identical(family):
    model, inputs = model_of(family), inputs_of(family, "one")
    wanted = generate(model, inputs)[1]
    assert torch.equal(recorded(model, inputs, "quest:keep_ratio=1")[1], wanted)


def test_a_step_reads_the_budget_and_the_cache_keeps_everything():
    run = recorded(model_of("Whisper"), inputs_of("Whisper"), "quest:keep_ratio=0.1,page=4")[2]
    assert run.report.kept_fraction == 1
    assert run.report.bytes_held == run.report.bytes_full
    assert {receipt.entries_read for receipt in run.report.steps} == {5.0}
    one = run.report.layers[0].bytes_held // 50 // 2  # keys of one entry, over all rows and heads
    assert {receipt.bytes_of_state for receipt in run.report.steps} == {2 * 13 * one}
    assert "reads 10.0%" in str(run.report)


def test_steps_read_different_entries():
    run = recorded(model_of("Whisper"), inputs_of("Whisper"), "quest:keep_ratio=0.1,page=1")[2]
    first = [read.columns for read in run.step_reads if read.layer_idx == 0]
    assert any(not torch.equal(one, other) for one, other in itertools.pairwise(first))


def test_wrong_options():
    with pytest.raises(PolicyOptionError, match="page of policy 'quest' is at least 1, got 0"):
        kvprune.get_policy("quest:page=0")
    with pytest.raises(BudgetError, match="keep_ratio"):
        kvprune.get_policy("quest:keep_ratio=0")
