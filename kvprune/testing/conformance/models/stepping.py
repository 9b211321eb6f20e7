"""What the decode steps of a tiny model read, under a policy that decides in them: KV16 and KV17.

Each check is a function of a policy and a `Scenario`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from kvprune.engine.step_counts import StepRead
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.decode import takes_steps
from kvprune.testing.conformance.common.budgets import keeping_all, reading_all
from kvprune.testing.conformance.common.results import Violation
from kvprune.testing.conformance.models.decoding import require_close
from kvprune.testing.conformance.models.forward_calls import alone, forward
from kvprune.testing.conformance.models.scenario import Generated, Scenario

__all__ = ["check_reads_everything", "check_steps_alone"]


def check_reads_everything(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """KV16: with a budget of everything, each step reads all that is held, as if it were not asked."""
    unlimited = reading_all(policy)
    if unlimited is None or not takes_steps(unlimited):
        return
    run, generated = scenario.run(unlimited)
    for read in run.step_reads:
        held = run.selections[read.layer_idx].mask[:, None]  # [B, 1, H or 1, S]
        missed = held & ~read.columns if read.columns.shape[0] == held.shape[0] else ~read.columns
        if bool(missed.any()):
            raise Violation(
                f"{unlimited.spec} to read all that layer {read.layer_idx} holds in each step",
                f"{int(missed.sum())} entries that no step read",
            )
    what = f"{unlimited.spec} to decode like "
    if keeping_all(policy) is None or not scenario.all_visible:
        _, unasked = scenario.run(_without_steps(unlimited))
        require_close(what + "the same policy that is asked in no step", generated, unasked, scenario)
    else:
        require_close(what + "the untouched model", generated, scenario.stock, scenario)


def _without_steps(policy: CrossKVPolicy) -> CrossKVPolicy:
    """Return a copy of a policy that decides the same in prefill, and nothing in decode steps."""
    made, cls = copy.copy(policy), type(policy)
    object.__setattr__(made, "__class__", type(cls.__name__, (cls,), {"takes_steps": False}))
    return made


def check_steps_alone(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """KV17: a sample reads in each step what it reads alone, and the same after another call."""
    if scenario.dtype != torch.float64:
        return  # in float32, rounding may decide
    greedy = dataclasses.replace(scenario, beams=1)
    fresh, together = greedy.run(policy)
    with greedy.compress(policy) as run:
        with torch.no_grad():
            forward(greedy.model, {name: tensor.flip(0)[:1] for name, tensor in greedy.batch().items()})
        run.record_steps()
        after = greedy.generate(greedy.model)
    _require_reads("after another call", (run.step_reads, after), (fresh.step_reads, together), None)
    for sample in range(greedy.batch_size):
        single = dataclasses.replace(greedy, inputs=alone(greedy.inputs, sample))
        own, generated = single.run(policy)
        what = f"sample {sample} in its batch"
        _require_reads(what, (fresh.step_reads, together), (own.step_reads, generated), sample)


def _require_reads(
    what: str,
    got: tuple[Sequence[StepRead], Generated],
    wanted: tuple[Sequence[StepRead], Generated],
    sample: int | None,
) -> None:
    """Raise unless two runs read the same in each step in which they have written the same before.

    Args:
        what: Which run, for the message.
        got: What a run read and generated.
        wanted: The same of another run.
        sample: The row of the first run that is the only row of the second one; None to compare all rows.
    """
    rows = slice(None) if sample is None else slice(sample, sample + 1)
    (reads, generated), (own_reads, own) = got, wanted
    steps = min(len(generated.logits), len(own.logits))
    written, own_written = (one.logits[:steps].argmax(-1) for one in (generated, own))  # [steps, B]
    layers = len({read.layer_idx for read in own_reads}) or 1
    for place, (read, other) in enumerate(zip(reads, own_reads, strict=False)):
        step = place // layers
        if not torch.equal(written[: step + 1, rows], own_written[: step + 1]):
            return  # they have written different tokens since
        if not _same(read.columns[rows], other.columns):
            raise Violation(
                f"{what} to read in step {step} at layer {read.layer_idx} what it reads otherwise, "
                f"{_listed(other.columns)}",
                _listed(read.columns[rows]),
            )


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two reads ``[B, T, H or 1, S]`` are equal; one may have fewer columns, and heads may share."""
    width = min(one.shape[-1], other.shape[-1])
    if bool(one[..., width:].any()) or bool(other[..., width:].any()):
        return False
    return bool((one[..., :width] == other[..., :width]).all())


def _listed(columns: Tensor) -> str:
    """Return the columns that each row and head reads, for a message."""
    text = str([row.nonzero().squeeze(1).tolist() for row in columns.flatten(0, 2)])
    return text if len(text) <= 200 else f"{text[:200]}..."
