"""`check_policy`: resolves what is to be checked, runs the table, reports."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Mapping

from kvprune.errors import ConformanceError, PolicyOptionError, UnknownInvariantError
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.options import required_options
from kvprune.policy.spec import PolicySpec
from kvprune.session.registry import load
from kvprune.testing.conformance.common.budgets import variants
from kvprune.testing.conformance.common.findings import ConformanceReport, Result
from kvprune.testing.conformance.common.reproducers import snippet
from kvprune.testing.conformance.common.search import run_check
from kvprune.testing.conformance.policies.classes import check_class, class_warnings
from kvprune.testing.conformance.policies.lab import Lab
from kvprune.testing.conformance.policies.table import CLASS, INVARIANTS, Invariant
from kvprune.testing.problems import LayerProblem, ModelProblem
from kvprune.text import suggestion

__all__ = ["as_expected", "check_policy", "failure_of", "recheck"]


def check_policy(
    policy: str | PolicySpec | CrossKVPolicy | type[CrossKVPolicy],
    *,
    only: Collection[str] | None = None,
    expected_failures: Mapping[str, str] | None = None,
    seed: int = 0,
    examples: int = 40,
) -> ConformanceReport:
    """Check a policy against the invariants KV01 to KV15, as far as a policy can break them.

    A class, or the bare name of an installed policy, is checked with its default options and with several
    budgets and choices of its other options; a policy, or a spec with options, as it is.

    Args:
        policy: A class, a policy, or a spec such as ``"trim:k_ratio=0.1"``.
        only: Ids of the invariants to check (and "class"); all by default.
        expected_failures: Reasons by id: these invariants must fail, which is reported and is no error.
        seed: Of the generated problems; the same seed poses the same problems.
        examples: Generated problems for each check, besides the corners that are always posed.

    Returns:
        The report, if the policy passed.

    Raises:
        ConformanceError: If an invariant fails, or one passes that is expected to fail. The message holds
            each id, what was expected, what was got, and code that reproduces it; ``.report`` is the report.
        UnknownInvariantError: If there is no invariant of an id.
        SpecError, UnknownPolicyError, PolicyOptionError, PluginError: If there is no such policy.

    Example:
        >>> import kvprune.testing
        >>> def test_my_policy():
        ...     kvprune.testing.check_policy(MyPolicy)
    """
    _require_hypothesis()
    expected = dict(expected_failures or {})
    for wanted in (*(only or ()), *expected):
        _row(wanted)
    subject, cls, made = _resolve(policy)
    lab = Lab(seed, examples)
    checked = _checked_class(cls, made)
    results = [checked] if only is None or CLASS.id in only or checked.outcome == "failed" else []
    # A class of which no policy can be made has no answers to check.
    if made or checked.outcome == "passed":
        policies = made or variants(cls)
        results += [lab.check(row, policies) for row in INVARIANTS if only is None or row.id in only]
    report = ConformanceReport(
        subject=subject,
        seed=seed,
        results=tuple(as_expected(result, expected.get(result.id)) for result in results),
        warnings=class_warnings(cls) if checked.outcome == "passed" else (),
    )
    if not report.passed:
        raise failure_of(report)
    return report


def recheck(
    invariant: str,
    policy: str | PolicySpec | CrossKVPolicy | type[CrossKVPolicy],
    problem: LayerProblem | ModelProblem | None = None,
) -> Result:
    """Check one invariant on one problem: what reproducers of `check_policy` call.

    Args:
        invariant: Its id.
        policy: As for `check_policy`.
        problem: The problem; None for "class".

    Returns:
        The result, if the check did not fail.

    Raises:
        ConformanceError: If the check fails.
        UnknownInvariantError: If there is none of this id, or it is not checked on such a problem.
    """
    row = _row(invariant)
    subject, cls, made = _resolve(policy)
    if row is CLASS:
        result = _checked_class(cls, made)
    else:
        checks = row.on_layers if isinstance(problem, LayerProblem) else row.on_models
        if problem is None or not checks:
            raise UnknownInvariantError(f"{invariant} is not checked on a {type(problem).__name__}")
        result = Lab(0, 0).check(row, made or variants(cls), problem)
    if result.outcome == "failed":
        raise failure_of(ConformanceReport(subject=subject, seed=0, results=(result,)))
    return result


def _row(invariant: str) -> Invariant:
    rows = {row.id: row for row in (CLASS, *INVARIANTS)}
    if invariant not in rows:
        raise UnknownInvariantError(
            f"no invariant {invariant!r}{suggestion(invariant, rows)} (there are {', '.join(rows)})"
        )
    return rows[invariant]


def failure_of(report: ConformanceReport) -> ConformanceError:
    """Return the error that tells all failures of a report."""
    ids = ", ".join(f"{result.id} ({result.outcome})" for result in report.failures)
    return ConformanceError("\n".join([f"{report.subject} breaks {ids}", *report.explanations]), report)


def _require_hypothesis() -> None:
    try:
        import hypothesis  # noqa: F401
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            'the conformance suite needs hypothesis, which is not installed: pip install "kvprune[test]"',
            name="hypothesis",
        ) from missing


def _resolve(
    policy: str | PolicySpec | CrossKVPolicy | type[CrossKVPolicy],
) -> tuple[str, type[CrossKVPolicy], list[CrossKVPolicy]]:
    """Return what to call it, its class, and the one policy to check, or none for variants of the class."""
    if isinstance(policy, str):
        policy = PolicySpec.parse(policy)
    if isinstance(policy, PolicySpec) and not policy.options:
        policy = load().policy_class(policy.name)
    if not isinstance(policy, type):
        made = load().get_policy(policy)
        return str(made.spec), type(made), [made]
    name = str(getattr(policy, "name", policy.__qualname__))
    required = required_options(policy)
    if required:
        raise PolicyOptionError(
            f"policy {name!r} needs the option {required[0]!r}, so its class cannot be checked with "
            f"default options; check a policy, or a spec such as '{name}:{required[0]}=...'"
        )
    return name, policy, []


def _checked_class(cls: type[CrossKVPolicy], made: list[CrossKVPolicy]) -> Result:
    start = time.perf_counter()
    violation = run_check(lambda: check_class(cls, made))
    seconds = time.perf_counter() - start
    if violation is None:
        return Result(id=CLASS.id, title=CLASS.title, outcome="passed", problems=1, seconds=seconds)
    return Result(
        id=CLASS.id,
        title=CLASS.title,
        outcome="failed",
        problems=1,
        seconds=seconds,
        detail=violation.detail,
        reproducer=snippet(CLASS.id, made[0] if made else cls, None),
    )


def as_expected(result: Result, reason: str | None) -> Result:
    """Turn the outcome of an invariant that is declared to fail."""
    if reason is None:
        return result
    if result.outcome == "not applicable":
        detail = f"{result.detail}\n(declared to fail, which has no effect: {reason})"
        return dataclasses.replace(result, detail=detail)
    if result.outcome == "failed":
        detail = f"{result.detail}\ndeclared: {reason}"
        return dataclasses.replace(result, outcome="expected failure", detail=detail)
    detail = f"declared to fail ({reason}), but it passed: remove the declaration"
    return dataclasses.replace(result, outcome="unexpectedly passed", detail=detail)
