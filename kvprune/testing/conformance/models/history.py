"""Whether a call gets the answer of a fresh block, whatever ran before; and whether a run writes to views.

Each check is a function of a policy and a `Scenario`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.decode import DecodePolicy, takes_steps
from kvprune.session.compression import Compression
from kvprune.testing.conformance.common.results import Violation
from kvprune.testing.conformance.models.decoding import require_close
from kvprune.testing.conformance.models.forward_calls import called, encoded, forward
from kvprune.testing.conformance.models.moments import break_off, count_calls
from kvprune.testing.conformance.models.scenario import Scenario
from kvprune.tokens.selection import Selection

__all__ = ["check_encoder_outputs", "check_history", "check_views_in_runs"]

_MOMENTS = ("choose", "select", "select_text", "prepare", "attend", "observe", "conclude")


def check_history(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """The same call gets the same answer after other calls, after an error, and after an interrupt."""
    fresh, _ = scenario.prefill(policy)
    with scenario.compress(policy) as run:
        for after, happen in _events(scenario):
            happen()
            with torch.no_grad():
                forward(scenario.model, scenario.batch())
            _require_selections(after, run, fresh)
        generated = scenario.generate(scenario.model)
    _, expected = scenario.run(policy)
    require_close("generation as in a fresh block, after all this", generated, expected, scenario)


def _events(scenario: Scenario) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield what may happen before a call, with its name. The last cross-attention layer runs after both."""
    calls = count_calls(scenario)

    def call_another_batch() -> None:
        with torch.no_grad():
            forward(scenario.model, {name: tensor.flip(0)[:1] for name, tensor in scenario.batch().items()})

    yield "after a call with another batch", call_another_batch
    yield "after an error in a prefill", lambda: break_off(scenario, int(0.7 * calls), MemoryError)
    yield (
        "after an interrupt (Ctrl-C) in a prefill",
        lambda: break_off(scenario, int(0.8 * calls), KeyboardInterrupt),
    )


def check_encoder_outputs(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """Encoder outputs that are passed by hand count as the input that they were made from, at any time."""
    fresh, _ = scenario.prefill(policy)
    with torch.no_grad():
        by_hand = encoded(scenario.pristine, scenario.batch())
        with scenario.compress(policy) as run:
            called(scenario.model, by_hand)
            _require_selections("with encoder outputs by hand", run, fresh)
            forward(scenario.model, {name: tensor.flip(0)[:1] for name, tensor in scenario.batch().items()})
            called(scenario.model, by_hand)
            _require_selections("with encoder outputs by hand, after another batch", run, fresh)


def _require_selections(when: str, run: Compression, fresh: Compression) -> None:
    """Raise unless the latest prefill of a run selected what the only one of another run did."""
    for name in ("selections", "prefill_selections"):
        got, wanted = getattr(run, name), getattr(fresh, name)
        for layer_idx in wanted:
            if got.get(layer_idx) != wanted[layer_idx]:
                raise Violation(
                    f"{when}, {name}[{layer_idx}] as in a fresh block, {_short(wanted[layer_idx])}",
                    _short(got.get(layer_idx)),
                )


def _short(selection: Selection | None) -> str:
    text = "all columns" if selection is None else str(selection.indices.tolist())
    return text if len(text) <= 200 else f"{text[:200]}..."


def check_views_in_runs(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """In a run, the policy leaves all tensors that it is shown unchanged, at each moment.

    Contents are compared. The engine compares version counters, which writing to ``tensor.data``, or to its
    array of numpy, leaves as they are.
    """
    changed: list[Violation] = []
    watched = _watched(policy, changed)
    try:
        if takes_steps(policy):
            with scenario.compress(watched):
                scenario.generate(scenario.model)
        else:
            scenario.prefill(watched)
    finally:
        if changed:  # the engine would report it as an error of the policy
            raise changed[0]


def _watched(policy: CrossKVPolicy, changed: list[Violation]) -> CrossKVPolicy:
    """Return a copy of a policy that notes when it changes what it is shown."""

    def watching(name: str) -> Callable[..., Any]:
        def ask(self: Any, shown: Any, *more: Any) -> Any:
            views = shown if isinstance(shown, Sequence) else [shown]
            tensors = [pair for view in views for pair in _tensors(view, "view")]
            before = [tensor.clone() for _, tensor in tensors]
            answer = getattr(super(watched, self), name)(shown, *more)
            for (where, tensor), clone in zip(tensors, before, strict=True):
                if not _equal(tensor, clone):
                    changed.append(Violation(f"{where} unchanged by {name} in a run", "other contents"))
            return answer

        return ask

    cls = type(policy)
    bases = (CrossKVPolicy, DecodePolicy)  # whose methods decide nothing
    defaults = {name: [getattr(base, name, None) for base in bases] for name in _MOMENTS}
    own = [name for name in _MOMENTS if getattr(cls, name, None) not in defaults[name]]
    watched = type(cls.__name__, (cls,), {name: watching(name) for name in own})
    made = copy.copy(policy)
    object.__setattr__(made, "__class__", watched)
    return made


def _tensors(view: Any, where: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a view and of what it holds, with their names."""
    for field in dataclasses.fields(view):
        value = getattr(view, field.name)
        if isinstance(value, Tensor):
            yield f"{where}.{field.name}", value
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from _tensors(value, where if field.name == "captured" else f"{where}.{field.name}")


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, NaN counted as equal to itself."""
    if one.is_meta:  # has no contents: the policy must choose without them
        return True
    return bool(torch.equal(one, other)) or bool(torch.allclose(one, other, 0, 0, equal_nan=True))
