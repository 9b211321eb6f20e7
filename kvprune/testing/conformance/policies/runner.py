"""Runs the checks of one invariant on corner cases and on generated problems."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from kvprune.adapters.base import ModelAdapter
from kvprune.policy.base import CrossKVPolicy
from kvprune.testing.conformance.common.isolation import isolated
from kvprune.testing.conformance.common.reproducers import snippet
from kvprune.testing.conformance.common.results import Result, Violation
from kvprune.testing.conformance.common.search import Finding, ProblemSource, search
from kvprune.testing.conformance.models.scenario import Scenario
from kvprune.testing.conformance.policies.corner_cases import LAYER_CORNERS, MODEL_CORNERS
from kvprune.testing.conformance.policies.invariants import (
    COMPARING_RESULTS,
    ON_TWO_DEVICES,
    WITH_EVERY_BUDGET,
    Invariant,
    LayerCheck,
    ModelCheck,
    is_exact,
)
from kvprune.testing.problems import LayerProblem, ModelProblem

__all__ = ["Runner"]

Problem = LayerProblem | ModelProblem


class Runner:
    """Runs rows of the suite; builds each model once.

    Args:
        seed: Seed of the generated problems.
        examples: Number of generated problems for each row.
    """

    def __init__(self, seed: int, examples: int) -> None:
        self._seed = seed
        self._examples = examples
        self._scenarios: dict[ModelProblem, Scenario] = {}
        self._left_out: dict[str, int] = {}  # number of problems that were not posed, by reason

    def check(
        self, row: Invariant, candidates: list[CrossKVPolicy], problem: Problem | None = None
    ) -> Result:
        """Run all checks of one row on generated problems, or on one given problem."""
        start = time.perf_counter()
        result = partial(Result, id=row.id, title=row.title)
        policies, reason = _applicable(row, candidates)
        if not policies:
            return result(outcome="not applicable", detail=reason)
        for scenario in self._scenarios.values():
            scenario.renew()  # damage that a policy did to a model is reported by KV12 alone
        self._left_out = {}
        posed, finding = self._search(row, policies, problem)
        result = partial(
            result, problems=posed - sum(self._left_out.values()), seconds=time.perf_counter() - start
        )
        if finding is None:
            return result(outcome="passed", detail="; ".join(filter(None, (row.limits(), *self._left_out))))
        return result(
            outcome="failed",
            detail=finding.violation.detail,
            reproducer=snippet(row.id, finding.policy, finding.problem),
        )

    def _search(
        self, row: Invariant, policies: list[CrossKVPolicy], problem: Problem | None
    ) -> tuple[int, Finding | None]:
        """Return how many problems were posed, and the first failure of any check of a row."""
        posed = 0
        for check, problems in self._checks(row, len(policies), problem):
            number, finding = search(check, policies, problems, seed=self._seed)
            posed += number
            if finding is not None:
                return posed, finding
        return posed, None

    def _checks(
        self, row: Invariant, policies: int, problem: Problem | None
    ) -> Iterator[tuple[Callable[[CrossKVPolicy, Any], None], ProblemSource]]:
        """Yield each check of a row with the problems that it is posed."""
        for on_layer in row.on_layers:
            if on_layer not in ON_TWO_DEVICES or torch.cuda.is_available():  # else `row.limits` reports it
                count = 0 if problem else max(10, self._examples // len(row.on_layers))
                yield on_layer, _layer_problems(on_layer, problem, count, policies)
        for on_model in row.on_models:
            count = 0 if problem else max(1, self._examples // 8)
            yield self._in_scenario(on_model), _model_problems(problem, count)

    def _in_scenario(self, check: ModelCheck) -> Callable[[CrossKVPolicy, ModelProblem], None]:
        def run(policy: CrossKVPolicy, problem: ModelProblem) -> None:
            scenario = self._scenario(problem)
            if missing := policy.needs - scenario.adapter_class.provides:
                self._leave_out(policy, scenario.adapter_class, sorted(missing))
            else:
                check(policy, scenario)

        return run

    def _scenario(self, problem: ModelProblem) -> Scenario:
        if problem not in self._scenarios:
            self._scenarios[problem] = Scenario.of(problem)
        return self._scenarios[problem]

    def _leave_out(self, policy: CrossKVPolicy, adapter: type[ModelAdapter], missing: list[str]) -> None:
        """Note that a model cannot provide what a policy needs; raise if no model of the suite can."""
        one_of_each = {problem.model: problem for problem in MODEL_CORNERS}.values()
        adapters = [self._scenario(problem).adapter_class for problem in one_of_each]
        if not any(policy.needs <= other.provides for other in adapters):
            families = ", ".join(other.family for other in adapters)
            raise Violation(
                f"a model that provides what {policy.name!r} needs, {sorted(policy.needs)}",
                f"no such model in the suite ({families})",
            )
        names = ", ".join(missing)
        note = f"what needs {names} was not checked on {adapter.family}, which does not provide it"
        self._left_out[note] = self._left_out.get(note, 0) + 1


def _applicable(row: Invariant, candidates: list[CrossKVPolicy]) -> tuple[list[CrossKVPolicy], str]:
    """Return the policies to check, one of those that are alike, and the first reason to leave one out."""
    policies: dict[object, CrossKVPolicy] = {}
    reason = ""
    for policy in candidates:
        try:
            with isolated():
                why = row.inapplicable(policy)
        except Exception:  # the check itself fails and reports it
            why = ""
        reason = reason or why
        if not why:
            policies.setdefault(row.representative(policy) or policy, policy)
    return list(policies.values()), reason


def _layer_problems(check: LayerCheck, problem: Problem | None, count: int, policies: int) -> ProblemSource:
    from kvprune.testing import strategies

    corner_cases = _given(problem, LAYER_CORNERS, LayerProblem)
    drawn = strategies.layer_problems()
    if check in COMPARING_RESULTS:
        corner_cases = [case for case in corner_cases if is_exact(case)]
        drawn = strategies.layer_problems(contents=("random",), dtypes=("float32", "float64"))
        drawn = drawn.filter(is_exact)
    return ProblemSource(
        corner_cases=corner_cases,
        drawn=drawn,
        count=count,
        shrink=True,
        per_corner_case=policies if check in WITH_EVERY_BUDGET else 3,
    )


def _model_problems(problem: Problem | None, count: int) -> ProblemSource:
    from kvprune.testing import strategies

    return ProblemSource(
        corner_cases=_given(problem, MODEL_CORNERS, ModelProblem),
        drawn=strategies.model_problems(),
        count=count,
        shrink=False,
        per_corner_case=2,
    )


def _given(problem: Any, corner_cases: tuple[Any, ...], kind: type) -> list[Any]:
    """Return the problem to check again if it is of this kind, or else the corner cases."""
    if problem is None:
        return list(corner_cases)
    return [problem] if isinstance(problem, kind) else []
