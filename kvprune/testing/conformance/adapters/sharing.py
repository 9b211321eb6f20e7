"""Copies and pickles of a model under compression, and calls of it from two threads.

Each check is a function of a policy and a `Scenario`.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import torch

from kvprune.errors import KVPruneError
from kvprune.policy.base import CrossKVPolicy
from kvprune.testing.conformance.common.results import Violation
from kvprune.testing.conformance.models.decoding import require_close
from kvprune.testing.conformance.models.forward_calls import called
from kvprune.testing.conformance.models.moments import acting_at, count_calls
from kvprune.testing.conformance.models.scenario import Scenario

__all__ = ["check_copies", "check_threads"]


def check_copies(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """Copies and pickles of a model under compression are free of it, and the model itself stays under it."""
    _, expected = scenario.run(policy)
    model = scenario.model
    with scenario.compress(policy) as run:
        free = copy.deepcopy(model)
        _require_free("a copy (copy.deepcopy)", free, scenario)
        if _can_be_pickled(scenario.pristine) and (pickled := _pickled(model)) is not None:
            _require_free("a pickle", pickle.loads(pickled), scenario)
        if run.report.prefills:
            raise Violation("calls of copies not to be reported", f"{run.report.prefills} prefills")
        generated = scenario.generate(model)
    require_close("the model itself to stay under its policy", generated, expected, scenario)
    _require_free("a copy, after the block", free, scenario)


def _require_free(what: str, model: Any, scenario: Scenario) -> None:
    """Raise unless a model generates what the untouched one does."""
    require_close(f"{what} to be free of the policy", scenario.generate(model), scenario.stock, scenario)


def _pickled(model: Any) -> bytes | None:
    """Return a pickle of a model under compression; None if an error of kvprune refuses it."""
    try:
        return pickle.dumps(model)
    except KVPruneError:
        return None
    except Exception as error:
        raise Violation(
            "a model under compression that can be pickled, or an error of kvprune that refuses it",
            f"{type(error).__name__}: {error}",
        ) from error


def _can_be_pickled(model: Any) -> bool:
    """Whether the untouched model can be pickled; one of a class in a function cannot."""
    try:
        pickle.dumps(model)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True


def check_threads(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """A second thread that calls the model during a prefill is refused or right, and the first one is right.

    The first thread stops in the middle of its prefill until the second one is done, or has waited a while.
    """
    batches = {"first": scenario.batch(), "second": {n: t.flip(0)[:1] for n, t in scenario.batch().items()}}
    expected: dict[str, Any] = {}
    for name, inputs in batches.items():
        with torch.no_grad(), scenario.compress(policy):
            expected[name] = called(scenario.model, inputs)["logits"]
    inside, go_on = threading.Event(), threading.Event()
    results: dict[str, Any] = {}

    def call(name: str) -> None:
        try:
            with torch.no_grad():
                results[name] = called(scenario.model, batches[name])["logits"]
        except Exception as error:
            results[name] = error
        finally:
            inside.set()

    stop = _stopping("first", inside, go_on)
    threads = {name: threading.Thread(target=call, args=(name,), name=name, daemon=True) for name in batches}
    middle = int(0.7 * count_calls(scenario))
    with acting_at(scenario.model, middle, stop), scenario.compress(policy):
        threads["first"].start()
        inside.wait(60)
        threads["second"].start()
        threads["second"].join(1)  # a second thread that waits for the first one is right, too
        go_on.set()
        for thread in threads.values():
            thread.join(60)
    _require_right("first", results, expected)
    if not isinstance(results.get("second"), KVPruneError):
        _require_right("second", results, expected)


def _stopping(thread: str, inside: threading.Event, go_on: threading.Event) -> Callable[[], None]:
    """Return what lets a thread wait inside its call."""

    def stop() -> None:
        if threading.current_thread().name == thread:
            inside.set()
            go_on.wait(60)

    return stop


def _require_right(name: str, results: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise unless a thread got the logits that it gets alone."""
    wanted = f"the {name} of two threads to get the logits that it gets alone"
    wanted += "" if name == "first" else ", or an error of kvprune"
    result = results.get(name)
    if not isinstance(result, torch.Tensor):
        raise Violation(wanted, f"{type(result).__name__} ({result})"[:500])
    same = result.shape == expected[name].shape
    apart = float((result - expected[name]).abs().max()) if same else float("inf")
    if not apart <= 1e-5:
        raise Violation(wanted, f"logits that differ by {apart:.2e}")
