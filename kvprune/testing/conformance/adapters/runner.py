"""Runs the checks of one invariant on an adapter, under built-in policies on tiny models."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvprune.adapters.base import ModelAdapter
from kvprune.policy.base import CrossKVPolicy
from kvprune.session.registry import load
from kvprune.testing.conformance.adapters.invariants import SETTINGS, AdapterInvariant
from kvprune.testing.conformance.common.reproducers import adapter_snippet
from kvprune.testing.conformance.common.results import NotApplicable, Result
from kvprune.testing.conformance.common.search import run_check
from kvprune.testing.conformance.models.scenario import Oracle, Scenario
from kvprune.testing.conformance.policies.invariants import ModelCheck

__all__ = ["AdapterRunner", "MakeInputs", "MakeModel"]

MakeModel = Callable[[torch.dtype], Any]
MakeInputs = Callable[[torch.dtype], dict[str, Tensor]]


class AdapterRunner:
    """Runs rows of the suite on one adapter; builds each model once.

    Args:
        adapter: The class to check.
        make_model: Returns a tiny model of a dtype; None for the model of ``adapter.example``.
        make_inputs: Returns a batch; None for the batch of ``adapter.example``.
        seed: Seed of the compression.
        oracle: The master oracle; None for `masked_oracle`.
    """

    def __init__(
        self,
        adapter: type[ModelAdapter],
        make_model: MakeModel | None,
        make_inputs: MakeInputs | None,
        seed: int,
        oracle: Oracle | None,
    ) -> None:
        self._adapter, self._seed, self._oracle = adapter, seed, oracle
        self._given = make_model, make_inputs
        self._make_model = make_model or (lambda dtype: adapter.example(dtype)[0])
        self._make_inputs = make_inputs or (lambda dtype: adapter.example(dtype)[1])
        self._models: dict[tuple[str, str], Any] = {}
        self._scenarios: dict[str, Scenario] = {}
        self._policies: dict[str, CrossKVPolicy] = {}

    def check(self, row: AdapterInvariant) -> Result:
        """Run all cases of one row, until one fails."""
        start, posed, reasons = time.perf_counter(), 0, list[str]()
        result = partial(Result, id=row.id, title=row.title)
        for scenario in self._scenarios.values():
            scenario.renew()  # what an adapter leaves behind is reported by KV12 alone
        for check, name, spec in _cases(row):
            before = len(reasons)
            violation = run_check(partial(self._check_one, check, name, spec, reasons))
            posed += len(reasons) == before
            if violation is not None:
                return result(
                    outcome="failed",
                    problems=posed,
                    seconds=time.perf_counter() - start,
                    detail=f"{violation.detail}\nunder {spec}, {_described(name)}",
                    reproducer=adapter_snippet(
                        row.id, self._adapter, *self._given, seed=self._seed, oracle=self._oracle
                    ),
                )
        return result(
            outcome="passed" if posed else "not applicable",
            problems=posed,
            seconds=time.perf_counter() - start,
            detail="; ".join(dict.fromkeys(reasons)),
        )

    def _check_one(self, check: ModelCheck, name: str, spec: str, reasons: list[str]) -> None:
        """Run a check under a policy in a setting; note why if that is not possible."""
        if spec not in self._policies:
            self._policies[spec] = load().get_policy(spec)
        try:
            check(self._policies[spec], self._scenario(name))
        except NotApplicable as reason:
            reasons.append(str(reason))

    def _scenario(self, name: str) -> Scenario:
        if name not in self._scenarios:
            dtype, attention, beams = SETTINGS[name]
            inputs = self._make_inputs(getattr(torch, dtype))
            model = self._model(dtype, attention)
            self._scenarios[name] = Scenario(
                model, inputs, beams, steps=4, seed=self._seed, adapter=self._adapter, oracle=self._oracle
            )
        return self._scenarios[name]

    def _model(self, dtype: str, attention: str) -> Any:
        if (dtype, attention) not in self._models:
            model = copy.deepcopy(self._make_model(getattr(torch, dtype)))
            if attention:
                try:
                    model.set_attn_implementation(attention)
                except (ValueError, ImportError, AttributeError) as error:
                    text = f"{type(model).__name__} has no {attention} attention ({str(error)[:200]})"
                    raise NotApplicable(text) from error
            self._models[dtype, attention] = model
        return self._models[dtype, attention]


def _cases(row: AdapterInvariant) -> Iterator[tuple[ModelCheck, str, str]]:
    """Yield each check of a row, with a name in `SETTINGS` and the spec of a policy."""
    for cases in row.cases:
        for name in cases.settings:
            for spec in cases.policies:
                yield cases.check, name, spec


def _described(name: str) -> str:
    """Describe a setting in words."""
    dtype, attention, beams = SETTINGS[name]
    search = f"{beams} beams" if beams > 1 else "greedy"
    return f"{dtype}, {search}{f', {attention} attention' if attention else ''}"
