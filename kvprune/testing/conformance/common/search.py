"""Poses problems to policies until a check fails: corner cases first, then problems that hypothesis draws."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kvprune.policy.base import CrossKVPolicy
from kvprune.testing.conformance.common.isolation import isolated
from kvprune.testing.conformance.common.results import Violation

__all__ = ["Finding", "ProblemSource", "run_check", "search"]

Check = Callable[[CrossKVPolicy, Any], None]


@dataclass(frozen=True)
class Finding:
    """A policy and a problem on which a check failed."""

    policy: CrossKVPolicy
    problem: Any
    violation: Violation


@dataclass(frozen=True, kw_only=True)
class ProblemSource:
    """Which problems a check is posed.

    Args:
        corner_cases: Problems that are always posed, small ones first.
        drawn: Hypothesis strategy that draws more problems.
        count: Number of drawn problems.
        shrink: Whether to look for a smaller failing problem among the drawn ones.
        per_corner_case: Number of policies to which each corner case is posed: the first one, and others in
            turns.
    """

    corner_cases: Sequence[Any]
    drawn: Any
    count: int
    shrink: bool
    per_corner_case: int


def run_check(check: Callable[[], None]) -> Violation | None:
    """Run one check and return what it found. An exception of the policy is a violation, too."""
    with isolated():
        try:
            check()
        except Violation as violation:
            return violation
        except Exception as error:
            return Violation("an answer", _described(error))
    return None


def _described(error: Exception) -> str:
    """Return the error's type and message, and the last two lines of its traceback."""
    frames = traceback.extract_tb(error.__traceback__)[-2:]
    lines = [f"  {frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in frames]
    text = str(error)
    return "\n".join([f"{type(error).__name__}: {text if len(text) < 500 else text[:500] + '...'}", *lines])


def search(
    check: Check, policies: Sequence[CrossKVPolicy], problems: ProblemSource, *, seed: int
) -> tuple[int, Finding | None]:
    """Return how many problems were posed, and the first failure, shrunk.

    Args:
        check: Called with a policy and a problem; raises `Violation`.
        policies: Policies of one class, with different options.
        problems: What to pose.
        seed: The same seed draws the same problems.
    """
    posed = 0
    for policy, problem in _corner_cases(policies, problems):
        posed += 1
        finding = _pose(check, policy, problem)
        if finding is not None:
            return posed, finding
    if not problems.count:
        return posed, None
    drawn, finding = _search_drawn(check, policies, problems, seed)
    return posed + drawn, finding


def _corner_cases(
    policies: Sequence[CrossKVPolicy], problems: ProblemSource
) -> Iterator[tuple[CrossKVPolicy, Any]]:
    """Yield each corner case with the first policy, and with some of the others in turns."""
    turn = 0
    for problem in problems.corner_cases:
        yield policies[0], problem
        for _ in range(min(problems.per_corner_case, len(policies)) - 1):
            turn += 1
            yield policies[1 + turn % (len(policies) - 1)], problem


def _pose(check: Check, policy: CrossKVPolicy, problem: Any) -> Finding | None:
    violation = run_check(lambda: check(policy, problem))
    return None if violation is None else Finding(policy, problem, violation)


def _search_drawn(
    check: Check, policies: Sequence[CrossKVPolicy], problems: ProblemSource, seed: int
) -> tuple[int, Finding | None]:
    """Return how many drawn problems were posed before a failure, and the smallest failure found."""
    import hypothesis
    from hypothesis import strategies as st

    found: list[Finding] = []
    posed = 0

    @hypothesis.seed(seed)
    @hypothesis.settings(**_settings(problems))
    @hypothesis.given(st.sampled_from(list(policies)), problems.drawn)
    def pose(policy: CrossKVPolicy, problem: Any) -> None:
        nonlocal posed
        posed += not found
        finding = _pose(check, policy, problem)
        if finding is not None:
            found.append(finding)
            raise finding.violation

    try:
        pose()
    except Exception:  # the violation itself, or hypothesis reports that it did not happen again
        if not found:
            raise
    return posed, found[-1] if found else None


def _settings(problems: ProblemSource) -> dict[str, Any]:
    import hypothesis

    shrinking = [hypothesis.Phase.shrink] if problems.shrink else []
    return {
        "max_examples": problems.count,
        "phases": [hypothesis.Phase.generate, *shrinking],
        "deadline": None,
        "database": None,
        "derandomize": False,
        "report_multiple_bugs": False,
        "print_blob": False,
        "verbosity": hypothesis.Verbosity.quiet,
        "suppress_health_check": list(hypothesis.HealthCheck),
    }
