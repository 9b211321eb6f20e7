"""What a policy must neither depend on nor change: global generators, clock, device, process (KV10, KV12)."""

from __future__ import annotations

import dataclasses
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.view import FeatureView, LayerView
from kvprune.testing.conformance.common.isolation import process_state, random_state
from kvprune.testing.conformance.common.results import Violation
from kvprune.testing.conformance.layers.answers import answer, pose, selections_of
from kvprune.testing.conformance.layers.purity import ask, require_same
from kvprune.testing.problems import LayerProblem
from kvprune.testing.reference import kept_sets
from kvprune.tokens.layout import Layout
from kvprune.tokens.visibility import Visibility

__all__ = ["check_clock", "check_devices", "check_process", "check_randomness"]


def check_randomness(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV10: the policy neither reads nor advances the global generators of torch, random and numpy."""
    answers = []
    for seed in (1, 2):
        _reseed(seed)
        before = random_state()
        answers.append(ask(policy, problem))
        for name, state in random_state().items():
            if name in before and not _same_state(state, before[name]):
                raise Violation(
                    f"an unchanged global generator of {name} (draw from view.random() instead)",
                    "it was advanced or seeded",
                )
    require_same("the same answer in any state of the global generators", *answers)


def _reseed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def _same_state(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple):
        return all(_same_state(a, b) for a, b in zip(one, other, strict=True))
    same = one == other
    return bool(same.all() if hasattr(same, "all") else same)


def check_clock(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV10: the same answer at any time of day."""
    answers = []
    for shift in (0, 12_345_679):
        with _clock_ahead(shift):
            answers.append(ask(policy, problem))
    require_same("the same answer at any time of day", *answers)


@contextmanager
def _clock_ahead(seconds: int) -> Iterator[None]:
    """Let the functions of `time` return a later time in the block."""
    names = ("time", "monotonic", "perf_counter", "process_time")
    real: dict[str, Callable[[], Any]] = {
        name + unit: getattr(time, name + unit) for name in names for unit in ("", "_ns")
    }

    def ahead(function: Callable[[], Any], factor: int) -> Callable[[], Any]:
        return lambda: function() + seconds * factor

    try:
        for name, function in real.items():
            setattr(time, name, ahead(function, 10**9 if name.endswith("_ns") else 1))
        yield
    finally:
        for name, function in real.items():
            setattr(time, name, function)


def check_devices(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV10: the same answer on a CUDA device."""
    here = answer(policy, pose(policy, problem))
    there = answer(policy, _moved(pose(policy, problem), "cuda"))
    on_cpu = {part: kept_sets(selection) for part, selection in selections_of(here)}
    on_cuda = {part: kept_sets(selection) for part, selection in selections_of(there)}
    for part in ("cache", "onward"):
        if on_cpu.get(part) != on_cuda.get(part):
            raise Violation(f"{part} on cuda as on the CPU, {on_cpu.get(part)}", f"{on_cuda.get(part)}")


def _moved(view: FeatureView | LayerView, device: str) -> FeatureView | LayerView:
    def moved(thing: Any) -> dict[str, Any]:
        fields = {field.name: getattr(thing, field.name) for field in dataclasses.fields(thing)}
        return {n: v.to(device) for n, v in fields.items() if isinstance(v, torch.Tensor)}

    see: Visibility = dataclasses.replace(view.visibility, **moved(view.visibility))
    layout = view.layout_of

    def moved_layout() -> Layout:
        assert layout is not None
        return dataclasses.replace(layout(), **moved(layout()))

    return dataclasses.replace(
        view, **moved(view), visibility=see, layout_of=None if layout is None else moved_layout
    )


def check_process(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV12: the policy leaves the global state of torch and transformers unchanged."""
    before = process_state()
    answer(policy, pose(policy, problem))
    after = process_state()
    changed = [name for name in before if before[name] != after[name]]
    if changed:
        raise Violation("unchanged global state of torch and transformers", f"changed: {', '.join(changed)}")
