"""Results of a suite: violations, one result for each invariant, and the report of a run."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from kvprune.errors import ConformanceError
from kvprune.text import printable

__all__ = [
    "SUITE_VERSION",
    "ConformanceReport",
    "NotApplicable",
    "Outcome",
    "Result",
    "Violation",
    "conclude",
]

SUITE_VERSION = 6
"""Raised whenever a policy or an adapter that passed before may fail now."""

Outcome = Literal["passed", "failed", "expected failure", "unexpectedly passed", "not applicable"]


class Violation(Exception):  # noqa: N818  a finding, which users never see as an error
    """A check found that an invariant is violated; the suite turns this into a failed result.

    Args:
        expected: What the invariant asks for.
        got: What was found instead.
    """

    def __init__(self, expected: str, got: str) -> None:
        super().__init__(f"expected {expected}; got {got}")
        self.expected = expected
        self.got = got

    @property
    def detail(self) -> str:
        """Expected and got, on a line each."""
        return f"expected {self.expected}\ngot {self.got}"


class NotApplicable(Exception):  # noqa: N818  an outcome, which users never see as an error
    """A check cannot be made on a model; the suite reports the reason and does not count the problem."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What the suite found about one invariant.

    Attributes:
        id: "KV01" to "KV17", or a word: "class" for the class itself, "view" for what an adapter shows
            policies, and others that docs/conformance.md lists.
        title: What is checked, in a few words.
        outcome: "passed", "failed", "expected failure", "unexpectedly passed" or "not applicable".
        problems: Number of problems that were posed.
        seconds: Time that this took.
        detail: What a failure expected and got; or what could not be checked, and why.
        reproducer: Python code that shows the failure; "" if there is none.
    """

    id: str
    title: str
    outcome: Outcome
    problems: int = 0
    seconds: float = 0.0
    detail: str = ""
    reproducer: str = ""


@dataclass(frozen=True, kw_only=True)
class ConformanceReport:
    """What the suite found about one policy, or one adapter.

    Attributes:
        subject: The policy's spec; its name if the class was checked with several options; or the name of an
            adapter's class.
        suite_version: Version of the suite that ran.
        seed: Seed of the generated problems.
        results: One result for each invariant that was asked for, in the order of their ids.
        warnings: What should be looked at although it is no failure.
    """

    subject: str
    seed: int
    results: tuple[Result, ...]
    warnings: tuple[str, ...] = ()
    suite_version: int = SUITE_VERSION

    @property
    def passed(self) -> bool:
        """Whether nothing failed that was not expected to, and nothing passed that was expected to fail."""
        return not self.failures

    @property
    def failures(self) -> tuple[Result, ...]:
        """Results that make the check fail: failed, and unexpectedly passed."""
        return tuple(r for r in self.results if r.outcome in ("failed", "unexpectedly passed"))

    @property
    def seconds(self) -> float:
        """What all of it took."""
        return sum(result.seconds for result in self.results)

    @property
    def verdict(self) -> str:
        """One line: passed or failed, and what was counted."""
        counts: dict[str, int] = {}
        for result in self.results:
            counts[result.outcome] = counts.get(result.outcome, 0) + 1
        listed = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        return (
            f"{printable(self.subject)} {'passed' if self.passed else 'FAILED'}: {listed} "
            f"({sum(result.problems for result in self.results)} problems, {self.seconds:.1f} s, "
            f"suite version {self.suite_version}, seed {self.seed})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready data."""
        return {
            "subject": self.subject,
            "suite_version": self.suite_version,
            "seed": self.seed,
            "passed": self.passed,
            "seconds": round(self.seconds, 3),
            "results": [asdict(result) for result in self.results],
            "warnings": list(self.warnings),
        }

    @property
    def explanations(self) -> list[str]:
        """Lines that explain failures, what was not applicable or not checked, and warnings."""
        lines: list[str] = []
        told: dict[str, str] = {}
        for result in self.results:
            if result.outcome == "passed":
                lines += ["", f"{result.id} passed, but {result.detail}"] if result.detail else []
                continue
            if result.outcome == "not applicable":
                lines += ["", f"{result.id} not applicable: {result.detail}"]
                continue
            lines += ["", f"{result.id} {result.title}: {result.outcome}"]
            if result.detail in told:
                lines.append(f"  as {told[result.detail]}")
                continue
            told[result.detail] = result.id
            lines += textwrap.indent(result.detail, "  ").splitlines()
            if result.reproducer:
                lines += ["  reproduce with:", *textwrap.indent(result.reproducer, "    ").splitlines()]
        lines += [line for warning in self.warnings for line in ("", f"warning: {warning}")]
        return [printable(line) for line in lines]  # what a policy raised is its author's text

    def __str__(self) -> str:
        lines = [f"{'id':<7} {'what':<42} {'outcome':<20} {'problems':>8} {'seconds':>8}"]
        lines += [
            f"{r.id:<7} {r.title:<42} {r.outcome:<20} {r.problems:>8} {r.seconds:>8.1f}" for r in self.results
        ]
        lines += self.explanations
        return "\n".join([*lines, "", self.verdict])


def _as_expected(result: Result, reason: str | None) -> Result:
    """Return the result with the outcome that it has if a failure is declared for a reason."""
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


def conclude(
    subject: str,
    seed: int,
    results: Iterable[Result],
    expected_failures: Mapping[str, str],
    warnings: tuple[str, ...] = (),
) -> ConformanceReport:
    """Return the report of a run.

    Args:
        subject: What was checked.
        seed: Seed of the run.
        results: What was found.
        expected_failures: Reasons by id: these invariants must fail.
        warnings: What should be looked at although it is no failure.

    Raises:
        ConformanceError: If the run did not pass.
    """
    outcomes = tuple(_as_expected(result, expected_failures.get(result.id)) for result in results)
    report = ConformanceReport(subject=subject, seed=seed, results=outcomes, warnings=warnings)
    if not report.passed:
        ids = ", ".join(f"{result.id} ({result.outcome})" for result in report.failures)
        raise ConformanceError("\n".join([f"{subject} breaks {ids}", *report.explanations]), report)
    return report
