"""How an adapter attaches to a model: it asks about each layer, and detaches also after an error.

Each check is a function of a policy and a `Scenario`; those that need no policy ignore it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.view import LayerView
from kvprune.session.compression import Compression
from kvprune.testing.conformance.common.isolation import require_unchanged, whole_state
from kvprune.testing.conformance.common.results import Violation
from kvprune.testing.conformance.models.scenario import Scenario
from kvprune.tokens.decision import Decision

__all__ = ["asking", "check_every_layer_decides", "check_failed_attach", "check_failed_policy"]


def check_every_layer_decides(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """The policy is asked once about each layer, in order of rank, and the report covers all layers."""
    views: list[LayerView] = []
    run, _ = scenario.prefill(asking(views.append, keeps_everything=True))
    wanted = list(enumerate(scenario.layer_indices))
    asked = [(view.rank, view.layer_idx) for view in views]
    if asked != wanted:
        raise Violation(f"the policy to be asked about (rank, layer_idx) {wanted}", str(asked))
    receipts = {receipt.layer_idx: receipt.decisions for receipt in run.report.layers}
    if receipts != dict.fromkeys(scenario.layer_indices, 1) or run.report.prefills != 1:
        raise Violation(
            f"a report of one prefill with one decision for each of layers {list(scenario.layer_indices)}",
            f"{run.report.prefills} prefills, decisions by layer {receipts}",
        )
    if run.is_attached:
        raise Violation("the compression to be detached after its block", "attached")


def asking(note: Callable[[LayerView], None], *, keeps_everything: bool = False) -> CrossKVPolicy:
    """Return a policy that needs queries and raw keys, calls a function with each view, and decides nothing.

    Args:
        note: Called with each view.
        keeps_everything: Whether columns that no text row sees are kept as well.
    """

    @dataclass(frozen=True, kw_only=True)
    class Asking(CrossKVPolicy):
        name = "asking"
        keeps_invisible = keeps_everything

        @property
        def needs(self) -> Any:
            return frozenset({"queries", "raw_keys"})

        def select(self, view: LayerView) -> Decision:
            note(view)
            return Decision()

    return Asking()


def check_failed_policy(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """KV12: the model is unchanged after a policy raised an error in the last layer of a prefill."""

    def fail_in_last_layer(view: LayerView) -> None:
        if view.rank == view.num_layers - 1:
            raise MemoryError("raised by the check")

    failing = asking(fail_in_last_layer)
    model = copy.deepcopy(scenario.pristine)
    before = whole_state(model)
    expected = "an error that a policy raises in the last layer to reach the caller"
    with _must_raise(expected), Compression(scenario.adapter_class(model), failing, scenario.seed):
        scenario.generate(model)
    require_unchanged("after a policy raised", before, whole_state(model))


def check_failed_attach(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """KV12: the model is unchanged if attaching fails at any hook, and if detaching is called twice."""
    model = copy.deepcopy(scenario.pristine)
    before = whole_state(model)
    with _failing_at(None) as counted:
        run = Compression(scenario.adapter_class(model), policy, scenario.seed).attach()
    run.detach()
    run.detach()
    require_unchanged("after detaching twice", before, whole_state(model))
    for number in sorted({1, (counted[0] + 1) // 2, counted[0]} - {0}):  # first, middle and last hook
        with _must_raise("an error while attaching to reach the caller"), _failing_at(number):
            Compression(scenario.adapter_class(model), policy, scenario.seed).attach()
        when = f"when attaching failed at hook {number} of {counted[0]}"
        require_unchanged(when, before, whole_state(model))


@contextmanager
def _must_raise(expected: str) -> Iterator[None]:
    """Suppress the block's MemoryError; raise `Violation` if there is none."""
    try:
        yield
    except MemoryError:
        return
    raise Violation(expected, "no error")


@contextmanager
def _failing_at(number: int | None) -> Iterator[list[int]]:
    """Make the registration of a hook fail, counted from 1; yield the number of registrations so far."""
    counted = [0]
    names = ("register_forward_pre_hook", "register_forward_hook")
    real: dict[str, Any] = {name: getattr(nn.Module, name) for name in names}

    def counting(register: Any) -> Any:
        def instead(*args: Any, **kwargs: Any) -> Any:
            counted[0] += 1
            if counted[0] == number:
                raise MemoryError("raised by the check")
            return register(*args, **kwargs)

        return instead

    try:
        for name, register in real.items():
            setattr(nn.Module, name, counting(register))
        yield counted
    finally:
        for name, register in real.items():
            setattr(nn.Module, name, register)
