"""`check_policy` and `recheck`: find the policy to check, run the invariants, and report."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from functools import partial

from kvprune.errors import PolicyOptionError, UnknownInvariantError
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.nesting import parts
from kvprune.policy.options import required_options
from kvprune.policy.spec import PolicySpec
from kvprune.policy.trained import TrainedPolicy
from kvprune.policy.weights import FRESH
from kvprune.session.registry import load
from kvprune.testing.conformance.common.budgets import variants
from kvprune.testing.conformance.common.reproducers import snippet
from kvprune.testing.conformance.common.results import ConformanceReport, Result, conclude
from kvprune.testing.conformance.common.search import run_check
from kvprune.testing.conformance.policies.invariants import CLASS, INVARIANTS, Invariant
from kvprune.testing.conformance.policies.policy_class import check_class, class_warnings
from kvprune.testing.conformance.policies.runner import Runner
from kvprune.testing.problems import LayerProblem, ModelProblem
from kvprune.text import suggestion

__all__ = ["check_policy", "recheck"]


def check_policy(
    policy: str | PolicySpec | CrossKVPolicy | type[CrossKVPolicy],
    *,
    only: Collection[str] | None = None,
    expected_failures: Mapping[str, str] | None = None,
    seed: int = 0,
    examples: int = 40,
) -> ConformanceReport:
    """Check a policy against the invariants KV01 to KV17, as far as a policy can break them, and in runs.

    A class, or the name of an installed policy without options, is checked with its default options, with
    several budgets, and with each choice of its other options. A policy, or a spec with options, is checked
    as it is.

    Args:
        policy: A class, a policy, or a spec such as ``"trim:k_ratio=0.1"``.
        only: Ids to check ("KV01", "history", "class", ...); all by default.
        expected_failures: Reasons by id: these invariants must fail. That is reported, and is no error.
        seed: Seed of the generated problems; the same seed poses the same problems.
        examples: Number of generated problems for each invariant, besides the corner cases that are always
            posed.

    Returns:
        The report, if the policy passed.

    Raises:
        ConformanceError: If an invariant fails, or passes although it is expected to fail. The message holds
            each id, what was expected, what was got, and code that reproduces it; ``.report`` is the report.
        UnknownInvariantError: If no invariant has an id.
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
    runner = Runner(seed, examples)
    checked = _checked_class(cls, made)
    results = [checked] if only is None or CLASS.id in only or checked.outcome == "failed" else []
    # A class of which no policy can be made has no answers to check.
    if made or checked.outcome == "passed":
        policies = made or variants(cls)
        results += [runner.check(row, policies) for row in INVARIANTS if only is None or row.id in only]
    warnings = class_warnings(cls) if checked.outcome == "passed" else ()
    return conclude(subject, seed, results, expected, warnings)


def recheck(
    invariant: str,
    policy: str | PolicySpec | CrossKVPolicy | type[CrossKVPolicy],
    problem: LayerProblem | ModelProblem | None = None,
) -> Result:
    """Check one invariant on one problem. Reproducers of `check_policy` call this.

    Args:
        invariant: Id of the invariant.
        policy: As for `check_policy`.
        problem: The problem; None for "class".

    Returns:
        The result, if the check did not fail.

    Raises:
        ConformanceError: If the check fails.
        UnknownInvariantError: If no invariant has this id, or it is not checked on such a problem.
    """
    row = _row(invariant)
    subject, cls, made = _resolve(policy)
    if row is CLASS:
        result = _checked_class(cls, made)
    else:
        checks = row.on_layers if isinstance(problem, LayerProblem) else row.on_models
        if problem is None or not checks:
            raise UnknownInvariantError(f"{invariant} is not checked on a {type(problem).__name__}")
        result = Runner(0, 0).check(row, made or variants(cls), problem)
    conclude(subject, 0, [result], {})
    return result


def _row(invariant: str) -> Invariant:
    rows = {row.id: row for row in (CLASS, *INVARIANTS)}
    if invariant not in rows:
        raise UnknownInvariantError(
            f"no invariant {invariant!r}{suggestion(invariant, rows)} (there are {', '.join(rows)})"
        )
    return rows[invariant]


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
    """Return a name for reports, the class, and the one policy to check (none: variants of the class)."""
    if isinstance(policy, str):
        policy = PolicySpec.parse(policy)
    if isinstance(policy, PolicySpec) and not policy.options:
        policy = load().policy_class(policy.name)
    if not isinstance(policy, type):
        made = load().get_policy(policy)
        _require_fitting(made)
        return str(made.spec), type(made), [made]
    name = str(getattr(policy, "name", policy.__qualname__))
    required = required_options(policy)
    if required:
        raise PolicyOptionError(
            f"policy {name!r} needs the option {required[0]!r}, so its class cannot be checked with "
            f"default options; check a policy, or a spec such as '{name}:{required[0]}=...'"
        )
    return name, policy, []


def _require_fitting(policy: CrossKVPolicy) -> None:
    """Refuse weights of one model, because the check runs on many small ones."""
    for part in parts(policy):
        if isinstance(part, TrainedPolicy) and part.trained_for and part.weights_path is not None:
            raise PolicyOptionError(
                f"the check runs on small models of many geometries, but the weights {part.weights!r} of "
                f"{part.name!r} fit one geometry; check it with weights={FRESH}, which fit any model"
            )


def _checked_class(cls: type[CrossKVPolicy], made: list[CrossKVPolicy]) -> Result:
    """Check the class itself."""
    start = time.perf_counter()
    violation = run_check(lambda: check_class(cls, made))
    seconds = time.perf_counter() - start
    result = partial(Result, id=CLASS.id, title=CLASS.title, problems=1, seconds=seconds)
    if violation is None:
        return result(outcome="passed")
    reproducer = snippet(CLASS.id, made[0] if made else cls, None)
    return result(outcome="failed", detail=violation.detail, reproducer=reproducer)
