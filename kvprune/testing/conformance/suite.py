"""The whole suite on one page: which check of which invariant runs on which problems, and `check_policy`."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from kvprune.errors import ConformanceError, UnknownInvariantError
from kvprune.policy import CrossKVPolicy, ScoringPolicy
from kvprune.registry import load
from kvprune.spec import PolicySpec, suggestion
from kvprune.testing.conformance import decisions, endtoend, purity
from kvprune.testing.conformance.budgets import keeping_all, stated_budget, variants, widening
from kvprune.testing.conformance.classes import check_class, class_warnings
from kvprune.testing.conformance.corners import LAYER_CORNERS, MODEL_CORNERS
from kvprune.testing.conformance.report import ConformanceReport, Result, Violation
from kvprune.testing.conformance.reproduce import snippet
from kvprune.testing.conformance.search import Finding, run_check, search
from kvprune.testing.problems import LayerProblem, ModelProblem

__all__ = ["INVARIANTS", "Invariant", "check_policy", "recheck"]

LayerCheck = Callable[[CrossKVPolicy, LayerProblem], None]
ModelCheck = Callable[[CrossKVPolicy, endtoend.Setting], None]


@dataclass(frozen=True)
class Invariant:
    """One row of the suite.

    Attributes:
        id: As in docs/invariants.md.
        title: What is checked, in a few words.
        on_layers: Checks of the policy's answers on one layer's view.
        on_models: Checks of whole runs of tiny models.
        inapplicable: Returns why a policy cannot be checked, or "".
        representative: What two policies have in common that need not both be checked.
    """

    id: str
    title: str
    on_layers: tuple[LayerCheck, ...] = ()
    on_models: tuple[ModelCheck, ...] = ()
    inapplicable: Callable[[CrossKVPolicy], str] = lambda policy: ""
    representative: Callable[[CrossKVPolicy], object] = lambda policy: policy


def _no_budget(policy: CrossKVPolicy) -> str:
    if stated_budget(policy) is None:
        return f"{policy.spec} states no budget (keep_ratio, keep_tokens) that could be counted"
    if not isinstance(policy, ScoringPolicy) and not policy.ranks_tokens:
        return f"{policy.spec} has a budget but does not say that it ranks tokens (ranks_tokens is False)"
    return ""


def _not_keeping_all(policy: CrossKVPolicy) -> str:
    if keeping_all(policy) is not None:
        return ""
    if all(decisions.decides_nothing(policy, problem) for problem in LAYER_CORNERS[:6]):
        return ""
    return f"{policy.spec} has no keep_ratio that could be 1, and does not keep all as it is"


def _not_ranking(policy: CrossKVPolicy) -> str:
    if not policy.ranks_tokens:
        return f"{policy.name} does not say that it ranks tokens (ranks_tokens is False)"
    return "" if len(widening(policy)) > 1 else f"{policy.spec} has no option that states a budget"


INVARIANTS = (
    Invariant("KV01", "shape and order of what is kept", (decisions.check_shape,), (endtoend.check_columns,)),
    Invariant("KV02", "the exact budget", (decisions.check_budget,), (endtoend.check_counts,), _no_budget),
    Invariant("KV03", "never empty, for no image", (decisions.check_groups,), (endtoend.check_images,)),
    Invariant(
        "KV04", "padding goes before visible tokens", (decisions.check_visible,), (endtoend.check_padding,)
    ),
    Invariant("KV05", "no row goes blind", (decisions.check_rows,), (endtoend.check_prefill_rows,)),
    Invariant(
        "KV06", "masks as wide as what is held", (purity.check_answers_stay,), (endtoend.check_mask_width,)
    ),
    Invariant(
        "KV07",
        "keeping all is bit-identical",
        (decisions.check_keeps_all,),
        (endtoend.check_identity,),
        _not_keeping_all,
        keeping_all,
    ),
    Invariant(
        "KV08",
        "dropping only the unseen is lossless",
        (decisions.check_keeps_all,),
        (endtoend.check_lossless,),
        _not_keeping_all,
        keeping_all,
    ),
    Invariant("KV09", "the order of kept tokens is irrelevant", (), (endtoend.check_storage_order,)),
    Invariant(
        "KV10",
        "purity",
        (
            purity.check_inputs,
            purity.check_instance,
            purity.check_randomness,
            purity.check_order,
            purity.check_clock,
            purity.check_references,
            purity.check_alone,
        ),
        (endtoend.check_repeatable, endtoend.check_alone_in_model),
    ),
    Invariant("KV11", "tensors and selection stay together", (), (endtoend.check_alignment,)),
    Invariant("KV12", "nothing is left behind", (purity.check_process,), (endtoend.check_clean_exit,)),
    Invariant("KV13", "the master oracle", (), (endtoend.check_oracle,)),
    Invariant(
        "KV14",
        "a larger budget keeps a superset",
        (decisions.check_monotone,),
        (),
        _not_ranking,
        lambda policy: tuple(map(str, (variant.spec for variant in widening(policy)))),
    ),
)

CLASS = Invariant("class", "options, specs and documentation")


def check_policy(
    policy: str | PolicySpec | CrossKVPolicy | type[CrossKVPolicy],
    *,
    only: Collection[str] | None = None,
    expected_failures: Mapping[str, str] | None = None,
    seed: int = 0,
    examples: int = 40,
) -> ConformanceReport:
    """Check a policy against the invariants KV01 to KV14, as far as a policy can break them.

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
    rows = {row.id: row for row in (CLASS, *INVARIANTS)}
    for wanted in (*(only or ()), *expected):
        if wanted not in rows:
            raise UnknownInvariantError(
                f"no invariant {wanted!r}{suggestion(wanted, rows)} (there are {', '.join(rows)})"
            )
    subject, cls, made = _resolve(policy)
    lab = _Lab(seed, examples)
    results: list[Result] = []
    for row in rows.values():
        if only is None or row.id in only:
            result = _checked_class(cls, made) if row is CLASS else lab.check(row, made or variants(cls))
            results.append(_as_expected(result, expected.get(row.id)))
            if row is CLASS and result.outcome == "failed" and not made:
                break  # a class that cannot be made a policy of has no answers to check
    report = ConformanceReport(
        subject=subject, seed=seed, results=tuple(results), warnings=class_warnings(cls)
    )
    if not report.passed:
        raise _error(report)
    return report


def recheck(
    invariant: str,
    policy: str | PolicySpec | CrossKVPolicy | type[CrossKVPolicy],
    problem: LayerProblem | ModelProblem | None = None,
) -> None:
    """Check one invariant on one problem: what reproducers of `check_policy` call.

    Args:
        invariant: Its id.
        policy: As for `check_policy`.
        problem: The problem; None for "class".

    Raises:
        ConformanceError: If the check fails.
    """
    subject, cls, made = _resolve(policy)
    if problem is None:
        result = _checked_class(cls, made)
    else:
        (row,) = (row for row in INVARIANTS if row.id == invariant)
        result = _Lab(0, 0).check(row, made or variants(cls), problem)
    if result.outcome == "failed":
        raise _error(ConformanceReport(subject=subject, seed=0, results=(result,)))


def _error(report: ConformanceReport) -> ConformanceError:
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
    if isinstance(policy, type):
        return str(getattr(policy, "name", policy.__qualname__)), policy, []
    if isinstance(policy, str):
        policy = PolicySpec.parse(policy)
    if isinstance(policy, PolicySpec) and not policy.options:
        found = load().policy_class(policy.name)
        return policy.name, found, []
    made = load().get_policy(policy)
    return str(made.spec), type(made), [made]


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
        detail=_detail(violation),
        reproducer=snippet(CLASS.id, made[0] if made else cls, None),
    )


def _as_expected(result: Result, reason: str | None) -> Result:
    """Turn the outcome of an invariant that is declared to fail."""
    if reason is None or result.outcome == "not applicable":
        return result
    if result.outcome == "failed":
        detail = f"{result.detail}\ndeclared: {reason}"
        return replace(result, outcome="expected failure", detail=detail)
    detail = f"declared to fail ({reason}), but it passed: remove the declaration"
    return replace(result, outcome="unexpectedly passed", detail=detail)


def _detail(violation: Violation) -> str:
    return f"expected {violation.expected}\ngot {violation.got}"


class _Lab:
    """Runs rows of the suite; builds each model only once."""

    def __init__(self, seed: int, examples: int) -> None:
        self._seed = seed
        self._examples = examples
        self._settings: dict[ModelProblem, endtoend.Setting] = {}

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
        posed, finding = self._search(row, list(policies.values()), problem)
        seconds = time.perf_counter() - start
        if finding is None:
            return Result(id=row.id, title=row.title, outcome="passed", problems=posed, seconds=seconds)
        return Result(
            id=row.id,
            title=row.title,
            outcome="failed",
            problems=posed,
            seconds=seconds,
            detail=_detail(finding.violation),
            reproducer=snippet(row.id, finding.policy, finding.problem),
        )

    def _search(
        self, row: Invariant, policies: list[CrossKVPolicy], problem: LayerProblem | ModelProblem | None
    ) -> tuple[int, Finding | None]:
        from kvprune.testing import strategies

        posed = 0
        for on_layer in row.on_layers:
            accepts = purity.is_exact if on_layer is purity.check_alone else None
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
                per_corner=3,
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
            if problem not in self._settings:
                self._settings[problem] = endtoend.Setting.of(problem)
            check(policy, self._settings[problem])

        return run


def _given(problem: Any, corners: tuple[Any, ...], kind: type) -> list[Any]:
    """The problem to check again if it is of this kind, or the corners."""
    if problem is None:
        return list(corners)
    return [problem] if isinstance(problem, kind) else []
