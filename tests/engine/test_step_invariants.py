"""KV16, KV17, and KV11 of a policy's state, on models, layouts and operations drawn by hypothesis."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from families import inputs_of, model_of
from generation import bart, generate, mllama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from step_policies import Hashes, ReadsAll, ReadsLogits, Remembers
from stepping import recorded

import kvprune
from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.cache.shared_rows import SharedRows
from kvprune.cache.step_memory import StepMemory
from kvprune.testing import mllama_inputs

few = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
samples = st.from_regex(r"t{0,3}([1-4]{1,2}t{1,3}){0,2}t", fullmatch=True)
batches = st.lists(samples, min_size=1, max_size=3).filter(
    lambda batch: any(letter.isdigit() for letter in "".join(batch))
)
policies = st.sampled_from([ReadsLogits(), Remembers(), Hashes()])


@few
@given(batches, st.sampled_from(["none", "selection"]), st.sampled_from([1, 2]))
def test_kv16_a_step_that_reads_everything_equals_full(batch, by, beams):
    model, inputs = mllama(torch.float64), mllama_inputs(batch, dtype=torch.float64)
    wanted = generate(model, inputs, 4, num_beams=beams)
    with kvprune.compress(model, ReadsAll(by=by)) as run:
        got = generate(model, inputs, 4, num_beams=beams)
    assert torch.equal(got[0], wanted[0])
    assert (got[1] - wanted[1]).abs().max() <= (1e-6 if by == "selection" else 0) + 1e-6
    for layer, receipt in zip(run.report.layers, run.report.steps, strict=True):
        assert receipt.bytes_held == layer.bytes_held
        assert receipt.bytes_read_per_step <= receipt.bytes_held * beams


def test_kv16_is_bit_identical_where_nothing_is_dropped():
    for family in ("Whisper", "BART", "Mllama"):
        model, inputs = model_of(family), inputs_of(family, "one")
        wanted = generate(model, inputs, num_beams=2)[1]
        assert torch.equal(recorded(model, inputs, ReadsAll(), num_beams=2)[1], wanted)


@few
@given(batches, policies, st.integers(0, 2))
def test_kv17_a_step_depends_on_its_own_sample_and_on_no_earlier_call(batch, policy, sample):
    sample %= len(batch)
    model, inputs = mllama(torch.float64), mllama_inputs(batch, dtype=torch.float64)
    one = {name: tensor[sample : sample + 1] for name, tensor in inputs.items()}
    with kvprune.compress(model, policy) as run:
        generate(model, {name: tensor.flip(0)[:1] for name, tensor in inputs.items()}, 3)  # another call
        run.record_steps()
        together, logits, _ = generate(model, inputs, 4)
    alone, own, single = recorded(model, one, policy, steps=4)
    length = one["input_ids"].shape[1]
    same = int((together[sample, length:] == alone[0, length:]).long().cumprod(0).sum())
    assert (logits[:same, sample] - own[:same, 0]).abs().max() <= 1e-6
    layers = len(run.selections)
    for got, wanted in list(zip(run.step_reads, single.step_reads, strict=True))[: layers * same]:
        columns = wanted.columns.shape[-1]
        assert torch.equal(got.columns[sample][..., :columns], wanted.columns[0])


def test_kv17_catches_a_policy_that_looks_at_other_samples():
    """The test above can fail: this policy ranks entries by the queries of the whole batch."""

    @dataclass(frozen=True, kw_only=True)
    class Peeks(ReadsLogits):
        name = "peeks"

        def attend(self, step, state):
            scores = torch.sin(step.queries.sum() + torch.arange(step.entries))
            return step.best(scores.expand(step.text_rows, 1, -1), 3)

    inputs = inputs_of("BART")
    together = recorded(bart(torch.float64), inputs, Peeks())[2]
    alone = recorded(bart(torch.float64), {name: one[:1] for name, one in inputs.items()}, Peeks())[2]
    assert any(
        not torch.equal(got.columns[:1], wanted.columns)
        for got, wanted in zip(together.step_reads, alone.step_reads, strict=True)
    )


operations = st.lists(
    st.one_of(
        st.tuples(st.just("reorder"), st.integers(0, 5)),
        st.tuples(st.just("swap copies"), st.integers(0, 5)),
        st.tuples(st.just("repeat"), st.integers(2, 3)),
        st.tuples(st.just("select"), st.integers(0, 5)),
        st.tuples(st.just("separate"), st.just(0)),
        st.tuples(st.just("copy"), st.just(0)),
        st.tuples(st.just("step"), st.integers(0, 5)),
    ),
    max_size=8,
)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.booleans(), operations)
def test_kv11_a_state_follows_its_rows(rows, copies, by_row, operations):
    """Each row of the batch keeps the state that belongs to its keys, beside plain lists of both."""
    layer = CrossKVLayer()
    layer.expect(None, 2, SharedRows(copies))
    keys = torch.arange(rows, dtype=torch.float64).repeat_interleave(copies)  # the sample of each row
    layer.update(*[keys[:, None, None, None].expand(-1, 1, 2, 1).clone()] * 2)
    state = {"of": torch.arange(rows, dtype=torch.float64)[:, None]}
    layer.steps = StepMemory(state, torch.device("cpu"), copies=copies, by_row=by_row)
    plain = [(int(key), float(key)) for key in keys]  # sample, state
    serial = 100.0
    for what, number in operations:
        batch = len(plain)
        random = torch.Generator().manual_seed(number)
        order = torch.randint(batch, (batch,), generator=random)
        if what == "swap copies":
            order = torch.arange(batch) // layer.copies * layer.copies + order % layer.copies
        if what in ("reorder", "swap copies"):
            layer.reorder_cache(order)
            plain = [plain[row] for row in order.tolist()]
        elif what == "repeat" and batch < 30:
            layer.batch_repeat_interleave(number)
            plain = [pair for pair in plain for _ in range(number)]
        elif what == "select":
            layer.batch_select_indices(order[: number + 1])
            plain = [plain[row] for row in order[: number + 1].tolist()]
        elif what == "separate":
            layer.separate()
        elif what == "copy":
            layer = copy.deepcopy(layer)
        elif what == "step" and by_row:
            made = serial + torch.arange(batch, dtype=torch.float64)[:, None]
            layer.steps.store({"of": made})
            plain = [(sample, float(value)) for (sample, _), value in zip(plain, made, strict=True)]
            serial += 100
        assert layer.spread()[0][:, 0, 0, 0].tolist() == [sample for sample, _ in plain]
        held = layer.steps.of_text_rows(layer.copies, 1)["of"][:, 0].tolist()
        assert held == [value for _, value in plain]
        many = layer.steps.of_text_rows(layer.copies, 2)["of"][:, 0].tolist()
        assert many == [value for _, value in plain for _ in range(2)]
    layer.reset()
    assert layer.steps is None
