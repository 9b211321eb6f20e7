"""Does something in the middle of a forward call: raises an error, an interrupt, or waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from kvprune.testing.conformance.common.results import Violation
from kvprune.testing.conformance.models.forward_calls import forward
from kvprune.testing.conformance.models.scenario import Scenario
from kvprune.testing.hooks import temporary

__all__ = ["acting_at", "break_off", "count_calls"]


def count_calls(scenario: Scenario) -> int:
    """Return how many calls of modules without children a prefill of the untouched model makes."""
    counted = [0]

    def count(*call: Any) -> None:
        counted[0] += 1

    hooks = (leaf.register_forward_hook(count) for leaf in _leaves(scenario.pristine))
    with temporary(hooks), torch.no_grad():
        forward(scenario.pristine, scenario.batch())
    return counted[0]


@contextmanager
def acting_at(model: Any, number: int, act: Callable[[], None]) -> Iterator[None]:
    """Call a function after that many calls of modules without children, counted from 1."""
    counted = [0]

    def count(*call: Any) -> None:
        counted[0] += 1
        if counted[0] == number:
            act()

    with temporary(leaf.register_forward_hook(count) for leaf in _leaves(model)):
        yield


def break_off(scenario: Scenario, number: int, error: type[BaseException]) -> None:
    """Run a prefill of the working copy that ends with an error after so many calls of modules.

    Raises:
        Violation: If the error does not reach the caller.
    """

    def fail() -> None:
        raise error("raised by the check")

    with suppress(error), acting_at(scenario.model, number, fail), torch.no_grad():
        forward(scenario.model, scenario.batch())
        raise Violation(f"a {error.__name__} in a layer to reach the caller", "no error")


def _leaves(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if next(module.children(), None) is None)
