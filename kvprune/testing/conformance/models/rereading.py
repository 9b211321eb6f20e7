"""What a tiny model generates when the last prompt token is read again (``compress(..., reread=True)``).

Each check is a function of a policy and a `Scenario`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.decode import takes_steps
from kvprune.session.compression import Compression
from kvprune.testing.conformance.common.results import NotApplicable, Violation
from kvprune.testing.conformance.models.decoding import require_close
from kvprune.testing.conformance.models.forward_calls import called, start_token
from kvprune.testing.conformance.models.moments import break_off, count_calls
from kvprune.testing.conformance.models.scenario import Scenario

__all__ = ["check_broken_rereading", "check_rereading", "check_rereading_in_full"]


def check_rereading(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """The last token sees what decoding sees. The policy decides as without it, and other rows stay."""
    again = _rereading(scenario)
    plain, _ = scenario.run(policy)
    run, generated = again.run(policy)
    _require_same_decisions(policy, run, plain)
    with again.masked(run):
        expected = again.generate(again.pristine)
    require_close("generation equal to the oracle with re-reading", generated, expected, again)
    _check_rows(policy, scenario, again)


def _check_rows(policy: CrossKVPolicy, scenario: Scenario, again: Scenario) -> None:
    """Raise unless re-reading changes the last row of a prompt, and no other."""
    batch = _prompt(scenario)
    with scenario.compress(policy):
        plain = _logits(scenario.model, batch)
    with again.compress(policy) as run:
        run.record_steps()
        got = _logits(again.model, batch)
    with again.masked(run):
        expected = _logits(again.pristine, batch)
    for what, wanted, rows in (("the oracle", expected, slice(None)), ("without", plain, slice(-1))):
        apart = float((got - wanted)[:, rows].abs().max())
        if not scenario.are_close(apart):
            raise Violation(f"rows of logits as in {what}", f"rows that differ by {apart:.2e}")


def check_rereading_in_full(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """Under a policy that keeps everything, the answer is that of the untouched model."""
    again = _rereading(scenario)
    _, generated = again.run(policy)
    require_close("the answer of the untouched model", generated, scenario.stock, again)


def check_broken_rereading(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """An error or an interrupt while the last token is read again leaves nothing to the next call."""
    again = _rereading(scenario)
    _, expected = again.run(policy)
    calls = count_calls(again)  # of a prefill; those of the second call follow
    with again.compress(policy) as run:
        for error in (MemoryError, KeyboardInterrupt):
            break_off(again, calls + 2, error)
            if run.report.prefills or run.report.rereads:
                raise Violation(
                    f"no trace of a call that a {error.__name__} ended", "a prefill in the report"
                )
        generated = again.generate(again.model)
    require_close("generation as in a fresh block, after all this", generated, expected, again)


def _rereading(scenario: Scenario) -> Scenario:
    """Return the scenario with re-reading."""
    if not scenario.adapter_class.rereads:
        raise NotApplicable(f"{scenario.adapter_class.__name__} cannot read the last token again")
    return replace(scenario, reread=True)


def _require_same_decisions(policy: CrossKVPolicy, run: Compression, plain: Compression) -> None:
    """Raise unless a run with re-reading holds what one without holds, and counts what it has read again.

    If steps free memory, what is held at the end is not compared: the run has taken one step more.
    """
    for name in ("selections", "prefill_selections", "text_selections"):
        if getattr(run, name) != getattr(plain, name):
            raise Violation(f"the same {name} with re-reading as without", "others")
    frees = takes_steps(policy) and policy.observes
    held = () if frees else ("bytes_held",)
    for name in (*held, "kept_per_sample", "text_bytes_held", "prefills"):
        got, wanted = getattr(run.report, name), getattr(plain.report, name)
        if str(got) != str(wanted):  # NaN is like NaN
            raise Violation(f"{name} with re-reading as without, {wanted}", f"{got}")
    if run.report.rereads != run.report.prefills:
        raise Violation(f"{run.report.prefills} prompts to be read again", f"{run.report.rereads}")


def _prompt(scenario: Scenario) -> dict[str, Tensor]:
    """Return a batch whose prompts have several tokens."""
    batch = scenario.batch()
    if scenario.pristine.config.is_encoder_decoder and "decoder_input_ids" not in batch:
        start = start_token(scenario.pristine)
        batch["decoder_input_ids"] = torch.tensor([[start, 4, 5]]).expand(scenario.batch_size, -1)
    return batch


@torch.no_grad()
def _logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the logits of all rows of a prompt, ``[B, T, V]``."""
    logits: Tensor = called(model, batch)["logits"]
    return logits
