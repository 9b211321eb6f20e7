"""Runs the checks of one row of the suite on corners and on generated problems."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from kvprune.adapters.base import ModelAdapter
from kvprune.policy.base import CrossKVPolicy
from kvprune.testing.conformance.common.findings import Result, Violation
from kvprune.testing.conformance.common.isolation import isolated
from kvprune.testing.conformance.common.reproducers import snippet
from kvprune.testing.conformance.common.search import Finding, search
from kvprune.testing.conformance.layers import (
    decisions,
    purity,
    several_layers,
    surroundings,
    texts,
)
from kvprune.testing.conformance.models.setting import Setting
from kvprune.testing.conformance.policies.corners import LAYER_CORNERS, MODEL_CORNERS
from kvprune.testing.conformance.policies.table import Invariant, ModelCheck
from kvprune.testing.problems import LayerProblem, ModelProblem

__all__ = ["Lab"]

_WITH_EVERY_BUDGET = (decisions.check_budget, several_layers.check_budget_of_layers)


class Lab:
    """Runs rows of the suite; builds each model only once."""

    def __init__(self, seed: int, examples: int) -> None:
        self._seed = seed
        self._examples = examples
        self._settings: dict[ModelProblem, Setting] = {}
        self._left_out: dict[str, int] = {}  # problems that were not posed, by the reason why

    def check(
        self,
        row: Invariant,
        candidates: list[CrossKVPolicy],
        problem: LayerProblem | ModelProblem | None = None,
    ) -> Result:
        """Run all checks of one row on generated problems, or on one given problem."""
        start = time.perf_counter()
        policies: dict[object, CrossKVPolicy] = {}
        reason = ""
        for policy in candidates:
            try:
                with isolated():
                    why = row.inapplicable(policy)
            except Exception:  # it fails in the check itself, where that is reported
                why = ""
            reason = reason or why
            if not why:
                policies.setdefault(row.representative(policy) or policy, policy)
        if not policies:
            return Result(id=row.id, title=row.title, outcome="not applicable", detail=reason)
        for setting in self._settings.values():
            setting.renew()  # what a policy did to a model is found by KV12, and disturbs no other row
        self._left_out = {}
        posed, finding = self._search(row, list(policies.values()), problem)
        posed -= sum(self._left_out.values())
        seconds = time.perf_counter() - start
        if finding is None:
            return Result(
                id=row.id,
                title=row.title,
                outcome="passed",
                problems=posed,
                seconds=seconds,
                detail="; ".join(filter(None, (row.limits(), *self._left_out))),
            )
        return Result(
            id=row.id,
            title=row.title,
            outcome="failed",
            problems=posed,
            seconds=seconds,
            detail=finding.violation.detail,
            reproducer=snippet(row.id, finding.policy, finding.problem),
        )

    def _search(
        self, row: Invariant, policies: list[CrossKVPolicy], problem: LayerProblem | ModelProblem | None
    ) -> tuple[int, Finding | None]:
        from kvprune.testing import strategies

        posed = 0
        for on_layer in row.on_layers:
            if on_layer is surroundings.check_devices and not torch.cuda.is_available():
                continue  # the row says so
            exact = on_layer in (
                purity.check_alone,
                several_layers.check_alone_in_layers,
                texts.check_text_alone,
                surroundings.check_devices,
            )
            accepts = purity.is_exact if exact else None
            corners = [p for p in _given(problem, LAYER_CORNERS, LayerProblem) if not accepts or accepts(p)]
            drawn = strategies.layer_problems()
            if accepts:
                drawn = strategies.layer_problems(contents=("random",), dtypes=("float32", "float64")).filter(
                    accepts
                )
            number, finding = search(
                on_layer,
                policies,
                corners,
                drawn,
                count=0 if problem else max(10, self._examples // len(row.on_layers)),
                seed=self._seed,
                shrink=True,
                per_corner=len(policies) if on_layer in _WITH_EVERY_BUDGET else 3,
            )
            posed += number
            if finding is not None:
                return posed, finding
        for on_model in row.on_models:
            number, finding = search(
                self._in_setting(on_model),
                policies,
                _given(problem, MODEL_CORNERS, ModelProblem),
                strategies.model_problems(),
                count=0 if problem else max(1, self._examples // 8),
                seed=self._seed,
                shrink=False,
                per_corner=2,
            )
            posed += number
            if finding is not None:
                return posed, finding
        return posed, None

    def _in_setting(self, check: ModelCheck) -> Callable[[CrossKVPolicy, ModelProblem], None]:
        def run(policy: CrossKVPolicy, problem: ModelProblem) -> None:
            setting = self._setting(problem)
            if missing := policy.needs - setting.adapter_class.provides:
                self._leave_out(policy, setting.adapter_class, sorted(missing))
            else:
                check(policy, setting)

        return run

    def _setting(self, problem: ModelProblem) -> Setting:
        if problem not in self._settings:
            self._settings[problem] = Setting.of(problem)
        return self._settings[problem]

    def _leave_out(self, policy: CrossKVPolicy, adapter: type[ModelAdapter], missing: list[str]) -> None:
        """Note that a model cannot give a policy what it needs, or raise if none of the suite's can."""
        one_of_each = {problem.model: problem for problem in MODEL_CORNERS}.values()
        adapters = [self._setting(problem).adapter_class for problem in one_of_each]
        if not any(policy.needs <= other.provides for other in adapters):
            families = ", ".join(other.family for other in adapters)
            raise Violation(
                f"a model that provides what {policy.name!r} needs, {sorted(policy.needs)}",
                f"none of those of the suite does ({families})",
            )
        names = ", ".join(missing)
        note = f"what needs {names} was not checked on {adapter.family}, which does not provide it"
        self._left_out[note] = self._left_out.get(note, 0) + 1


def _given(problem: Any, corners: tuple[Any, ...], kind: type) -> list[Any]:
    """The problem to check again if it is of this kind, or the corners."""
    if problem is None:
        return list(corners)
    return [problem] if isinstance(problem, kind) else []
