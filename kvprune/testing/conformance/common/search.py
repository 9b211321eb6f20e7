"""Poses problems to policies until a check fails: corners first, then drawn ones, shrunk by hypothesis."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvprune.policy.base import CrossKVPolicy
from kvprune.testing.conformance.common.findings import Violation
from kvprune.testing.conformance.common.isolation import isolated

__all__ = ["Finding", "run_check", "search"]


@dataclass(frozen=True)
class Finding:
    """A policy and a problem on which a check failed."""

    policy: CrossKVPolicy
    problem: Any
    violation: Violation


def run_check(check: Callable[[], None]) -> Violation | None:
    """Run one check; return what it found. An exception of the policy is a violation, too."""
    with isolated():
        try:
            check()
        except Violation as violation:
            return violation
        except Exception as error:
            return Violation("an answer", _described(error))
    return None


def _described(error: Exception) -> str:
    """The error, and the lines it came from."""
    frames = traceback.extract_tb(error.__traceback__)[-2:]
    lines = [f"  {frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in frames]
    text = str(error)
    return "\n".join([f"{type(error).__name__}: {text if len(text) < 500 else text[:500] + '...'}", *lines])


def search(
    check: Callable[[CrossKVPolicy, Any], None],
    policies: Sequence[CrossKVPolicy],
    corners: Sequence[Any],
    drawn: Any,
    *,
    count: int,
    seed: int,
    shrink: bool,
    per_corner: int,
) -> tuple[int, Finding | None]:
    """Return how many problems were posed, and the first failure, shrunk.

    Args:
        check: Called with a policy and a problem; raises `Violation`.
        policies: Of one class, with different options.
        corners: Problems that are always posed, small ones first.
        drawn: Hypothesis strategy of more problems.
        count: How many of these.
        seed: Makes the drawn problems the same again.
        shrink: Whether to look for a smaller failing problem among the drawn ones.
        per_corner: To how many of the policies each corner is posed, in turns; the first always among them.
    """
    posed = 0
    turn = 0
    for problem in corners:
        chosen = [policies[0]]
        for _ in range(min(per_corner, len(policies)) - 1):
            turn += 1
            chosen.append(policies[1 + turn % (len(policies) - 1)])
        for policy in chosen:
            posed += 1
            violation = run_check(lambda p=policy, q=problem: check(p, q))  # type: ignore[misc]
            if violation is not None:
                return posed, Finding(policy, problem, violation)
    drawn_count, finding = _draw(check, policies, drawn, count, seed, shrink) if count else (0, None)
    return posed + drawn_count, finding


def _draw(
    check: Callable[[CrossKVPolicy, Any], None],
    policies: Sequence[CrossKVPolicy],
    drawn: Any,
    count: int,
    seed: int,
    shrink: bool,
) -> tuple[int, Finding | None]:
    import hypothesis
    from hypothesis import strategies as st

    found: list[Finding] = []
    posed = 0
    phases = [hypothesis.Phase.generate, *([hypothesis.Phase.shrink] if shrink else [])]

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        phases=phases,
        deadline=None,
        database=None,
        derandomize=False,
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=hypothesis.Verbosity.quiet,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.sampled_from(list(policies)), drawn)
    def pose(policy: CrossKVPolicy, problem: Any) -> None:
        nonlocal posed
        posed += not found
        violation = run_check(lambda: check(policy, problem))
        if violation is not None:
            found.append(Finding(policy, problem, violation))
            raise violation

    try:
        pose()
    except Exception:  # the violation itself, or that it did not happen again
        if not found:
            raise
    return posed, found[-1] if found else None
