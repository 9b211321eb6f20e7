"""The conformance suite: who passes, how it reports, and that its reproducers are to be trusted."""

from __future__ import annotations

import inspect
import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from anywhere import on_any_model
from kvprune_strategies import kvprune_policies
from zoo.budget import IgnoresBudget
from zoo.leftovers import DefaultDtype, GlobalHook
from zoo.monotone import Stride
from zoo.randomness import ReseedsTheWorld
from zoo.shape import NanScores, Unsorted

import kvprune
from kvprune import ScoringPolicy, Selection
from kvprune.errors import ConformanceError, PolicyOptionError, SpecError, UnknownInvariantError
from kvprune.testing import LayerProblem, ModelProblem, check_policy, recheck, strategies
from kvprune.testing.conformance import INVARIANTS, SUITE_VERSION
from kvprune.testing.conformance.common.isolation import process_state
from kvprune.testing.conformance.policies.runner import Runner

_NOT_APPLICABLE = {
    "adakv": {"KV15"},
    "aircache": {"KV15"},
    "answer-attention": {"KV15"},
    "attnpred": {"KV02", "KV09", "KV15"},
    "cdpruner": {"KV15"},
    "csp": {"KV15"},
    "divprune": {"KV15"},
    "elastic": set(),
    "expected": {"KV15"},
    "fastv": {"KV15"},
    "full": {"KV02", "KV14", "KV15"},
    "guided": {"KV15"},
    "h2o": {"KV15"},
    "keydiff": {"KV15"},
    "kvzip": {"KV15"},
    "meanpool": {"KV14", "KV15"},
    "lossless": {"KV02", "KV14", "KV15"},
    "norm": {"KV15"},
    "prefixkv": {"KV15"},
    "prumerge": set(),
    "pyramid": {"KV15"},
    "quecc": {"KV02", "KV07", "KV08", "KV14", "KV15"},
    "quest": {"KV02", "KV09", "KV15"},
    "random": {"KV15"},
    "snapkv": {"KV15"},
    "then": {"KV02", "KV07", "KV08", "KV14", "KV15"},
    "topv": {"KV15"},
    "trim": {"KV15"},
    "uniform": {"KV14", "KV15"},
    "vatp": {"KV15"},
    "visionzip": set(),
    "vlcache": {"KV15"},
    "zipvl": {"KV15"},
}
NOT_APPLICABLE = {
    name: ids if name in ("attnpred", "quest") else ids | {"KV16", "KV17"}
    for name, ids in _NOT_APPLICABLE.items()
}


def failure_of(policy, **options):
    with pytest.raises(ConformanceError) as failure:
        check_policy(policy, **options)
    return failure.value


QUICK = (
    LayerProblem(layouts=("tt4tt1tt", "t2tt", "14ttt")),
    LayerProblem(layouts=("4tt", "1t"), family="encoder-decoder", patches=3),
    ModelProblem(layouts=("tt4ttt", "t1tt"), beams=2),
    ModelProblem(layouts=("tttt", "tt"), model="bart"),
)
"""What each built-in policy is posed in the default run, by halves; the whole suite is slow."""


WITH_DEFAULT_OPTIONS = {
    **NOT_APPLICABLE,
    "prumerge": {"KV02", "KV14", "KV16", "KV17"},
    "zipvl": {"KV02", "KV14", "KV15", "KV16", "KV17"},
}
"""What does not apply to a policy with default options, where this is more than for all its options."""


@pytest.fixture(scope="module")
def runner():
    """A runner for all policies: it computes only once what the untouched models generate."""
    return Runner(seed=0, examples=0)


@pytest.mark.parametrize("half", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NOT_APPLICABLE)
def test_built_in_policies_pass_on_a_few_problems(name, half, runner):
    """Half of all pairs of invariant and problem, in a chessboard: each policy meets both families."""
    policy = on_any_model(name)
    assert recheck("class", policy).outcome == "passed"
    first = half + list(NOT_APPLICABLE).index(name)
    for number, row in enumerate(INVARIANTS, first):
        wanted = "not applicable" if row.id in WITH_DEFAULT_OPTIONS[name] else "passed"
        for problem in QUICK[number % 2 :: 2]:
            if row.on_layers if isinstance(problem, LayerProblem) else row.on_models:
                result = runner.check(row, [policy], problem)
                assert result.outcome == wanted, (result, problem)


ONE_OF_EACH_KIND = ("elastic", "norm", "topv")
"""Merges; decides at each layer; by features. test_moments.py has one that decides after prefill."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_built_in_policies_pass_with_default_options(name):
    require_passed(name, check_policy(kvprune.get_policy(name), examples=8))


@pytest.mark.slow
@pytest.mark.parametrize("name", NOT_APPLICABLE)
def test_built_in_policies_pass_with_all_options(name):
    require_passed(name, check_policy(name, examples=8))


def require_passed(name, report):
    assert report.passed
    outcomes = {result.id: result.outcome for result in report.results}
    assert list(outcomes) == ["class", *(row.id for row in INVARIANTS)]
    for invariant, outcome in outcomes.items():
        assert outcome == ("not applicable" if invariant in NOT_APPLICABLE[name] else "passed")
    assert report.warnings == ()
    for result in report.results:
        assert result.problems > 0 or result.outcome == "not applicable"


def test_built_in_policies_are_all_here():
    assert set(NOT_APPLICABLE) == {policy.name for policy in kvprune_policies()}


@dataclass(frozen=True, kw_only=True)
class ValueSpread(ScoringPolicy):
    """A third party's policy, for which nothing was prepared: distance to the mean of visible values."""

    name = "value-spread"

    def score(self, view):
        values, seen = view.values.double(), view.visible[:, None, :, None]
        mean = (values * seen).sum(2, keepdim=True) / seen.sum(2, keepdim=True).clamp(min=1)
        return (values - mean).norm(dim=-1)


def test_a_third_partys_policy_passes_in_two_lines():
    report = check_policy(ValueSpread, only=["class", "KV02", "KV03", "KV10", "KV13"])
    assert {result.outcome for result in report.results} == {"passed"}


def test_a_mean_over_columns_that_other_samples_brought_is_found():
    class OverAllColumns(ValueSpread):
        def score(self, view):
            values = view.values.double()
            return (values - values.mean(2, keepdim=True)).norm(dim=-1)

    policy = dataclass(frozen=True, kw_only=True)(OverAllColumns)
    assert "alone as in the batch" in str(failure_of(policy, only=["KV10"]))


@pytest.mark.parametrize(
    ("spec", "invariant", "reason"),
    [
        ("trim:k_ratio=0.1", "KV02", "trim:k_ratio=0.1 states no budget"),
        ("trim:k_ratio=0.1", "KV07", "no keep_ratio that could be 1"),
        ("uniform:keep_ratio=0.3", "KV14", "ranks_tokens is False"),
        ("lossless", "KV14", "ranks_tokens is False"),
    ],
)
def test_what_does_not_apply_says_why(spec, invariant, reason):
    (result,) = check_policy(spec, only=[invariant]).results
    assert result.outcome == "not applicable"
    assert reason in result.detail
    assert result.problems == 0


def test_k_ratio_is_a_budget_that_grows():
    (result,) = check_policy("trim:k_ratio=0.1", only=["KV14"]).results
    assert result.outcome == "passed"


def test_all_failures_are_collected_and_the_same_one_is_told_once():
    error = failure_of(NanScores, only=["KV01", "KV02", "KV12"])
    text = str(error)
    assert text.startswith("nan-scores breaks KV01 (failed), KV02 (failed), KV12 (failed)")
    assert "got ScoreError: policy 'nan-scores' at layer" in text
    assert "kvprune/policy/checks.py:" in text  # the last lines of the traceback
    assert [result.outcome for result in error.report.results] == ["failed"] * 3
    assert "  as KV01" in text


def test_the_report_is_readable_and_json():
    report = failure_of(Stride, only=["KV01", "KV14"]).report
    assert not report.passed
    assert [result.id for result in report.failures] == ["KV14"]
    data = json.loads(json.dumps(report.to_dict()))
    assert data["subject"] == "stride"
    assert (data["suite_version"], data["seed"], data["passed"]) == (SUITE_VERSION, 0, False)
    assert [result["outcome"] for result in data["results"]] == ["passed", "failed"]
    assert data["results"][1]["reproducer"]
    text = str(report)
    assert "KV01    shape and order of what is kept" in text
    assert "stride FAILED: 1 passed, 1 failed" in text
    assert "recheck('KV14', policy, problem)" in text


def test_declared_failures_are_reported_and_pass():
    report = check_policy(Stride, only=["KV01", "KV14"], expected_failures={"KV14": "it is a stride"})
    assert report.passed
    assert report.results[1].outcome == "expected failure"
    assert "declared: it is a stride" in str(report)


def test_a_declared_failure_that_passes_fails_the_check():
    error = failure_of("random", only=["KV14"], expected_failures={"KV14": "I thought so"})
    assert "breaks KV14 (unexpectedly passed)" in str(error)
    assert "declared to fail (I thought so), but it passed: remove the declaration" in str(error)


@pytest.mark.parametrize("options", [{"only": ["KV18"]}, {"expected_failures": {"KV18": "x"}}])
def test_unknown_invariants_are_refused(options):
    with pytest.raises(
        UnknownInvariantError, match=r"no invariant 'KV18'; did you mean 'KV1.*there are class"
    ):
        check_policy("full", **options)
    with pytest.raises(UnknownInvariantError, match="KV18"):
        recheck("KV18", "full", LayerProblem())
    with pytest.raises(UnknownInvariantError, match="KV13 is not checked on a LayerProblem"):
        recheck("KV13", "full", LayerProblem())


def test_what_is_no_policy_is_refused():
    with pytest.raises(SpecError, match="got 42"):
        check_policy(42)
    assert "a class derived from CrossKVPolicy" in str(failure_of(int))


@dataclass(frozen=True, kw_only=True)
class NeedsADepth(ScoringPolicy):
    name = "needs-a-depth"

    depth: int

    def score(self, view):
        return view.values.double().norm(dim=-1) * self.depth


def test_a_class_with_a_required_option_is_checked_as_a_policy():
    with pytest.raises(PolicyOptionError, match=r"needs the option 'depth'.*'needs-a-depth:depth=\.\.\.'"):
        check_policy(NeedsADepth)
    report = check_policy(NeedsADepth(depth=2), only=["class", "KV01"])
    assert report.subject == "needs-a-depth:keep_ratio=0.5,depth=2"
    assert "NeedsADepth has no docstring; `kvprune list`" in report.warnings[0]
    assert "options without a line under Args: depth" in report.warnings[1]


def test_the_same_seed_finds_the_same():
    first, again = (failure_of(IgnoresBudget, only=["KV02"], seed=3).report for _ in range(2))
    assert first.results[0].reproducer == again.results[0].reproducer
    assert first.results[0].detail == again.results[0].detail
    assert first.results[0].problems == again.results[0].problems


@dataclass(frozen=True, kw_only=True)
class FailsFarOut(ScoringPolicy):
    """Wrong where no corner is: with three samples in the last layer."""

    name = "fails-far-out"

    def score(self, view):
        scores = view.values.double().norm(dim=-1)
        far_out = scores.shape[0] == 3 and view.rank == 2
        return scores[:1] if far_out else scores


def test_drawn_failures_are_shrunk():
    (result,) = failure_of(FailsFarOut(), only=["KV01"]).report.results
    line = next(line for line in result.reproducer.splitlines() if line.startswith("problem ="))
    problem = eval(line.partition("=")[2], {"LayerProblem": LayerProblem})
    assert (len(problem.layouts), problem.rank, problem.kv_heads) == (3, 2, 1)
    assert len("".join(problem.layouts)) <= 5
    assert (problem.seed, problem.dtype, problem.content) == (0, "float32", "random")


def test_reproducers_run_in_a_new_process():
    pasted = failure_of(Unsorted, only=["KV01"]).report.results[0].reproducer
    assert "from zoo.shape import Unsorted" in pasted
    registered = (
        "import kvprune\nfrom kvprune.testing import ModelProblem, recheck\n\n"
        "policy = kvprune.get_policy('random:keep_ratio=0.3')\n"
        "assert recheck('KV13', policy, ModelProblem(layouts=('1t',))).outcome == 'passed'\n"
    )
    code = f"import sys; sys.path = {sys.path!r}\n{registered}\n{pasted}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "kvprune.errors.ConformanceError: unsorted breaks KV01 (failed)" in done.stderr


def test_a_reproducer_names_installed_policies_by_their_spec():
    from kvprune.testing.conformance.common.reproducers import snippet

    text = snippet("KV02", kvprune.get_policy("trim:k_ratio=0.1"), LayerProblem(patches=10))
    assert "policy = kvprune.get_policy('trim:k_ratio=0.1')" in text
    assert "problem = LayerProblem(patches=10)" in text


def test_a_reproducer_says_what_it_cannot_import():
    @dataclass(frozen=True, kw_only=True)
    class Local(Stride):
        name = "local"

    (result,) = failure_of(Local, only=["KV14"]).report.results
    assert "# test_a_reproducer_says_what_it_cannot_import.<locals>.Local of" in result.reproducer
    assert "must be defined here" in result.reproducer
    assert "policy = Local(keep_ratio=0.5)" in result.reproducer


def test_a_badly_behaved_policy_does_not_spoil_the_process():
    torch.manual_seed(5)
    random.seed(5)
    before, numbers = process_state(), (torch.get_rng_state(), random.getstate())
    for cls in (GlobalHook, DefaultDtype, ReseedsTheWorld):
        failure_of(cls, only=["KV07", cls.caught_by[0]])
    assert process_state() == before
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert random.getstate() == numbers[1]


def test_the_table_covers_the_documented_invariants():
    in_words = ["views", "history", "rows", "padding", "reread"]
    assert [row.id for row in INVARIANTS] == [f"KV{number:02d}" for number in range(1, 18)] + in_words
    for row in INVARIANTS:
        assert row.on_layers or row.on_models


def test_a_model_problem_is_checked_again():
    assert recheck("KV13", "trim", ModelProblem(layouts=("2tt",), beams=2)).problems >= 1


def test_a_selection_of_the_core_is_not_trusted():
    """A selection made behind the back of `Selection`'s own checks is caught by the suite's."""
    assert isinstance(Unsorted().select(LayerProblem().view()).cache, Selection)
    assert "strictly increasing columns" in str(failure_of(Unsorted, only=["KV01"]))


def test_a_declaration_that_cannot_matter_says_so():
    report = check_policy("uniform", only=["KV14"], expected_failures={"KV14": "a stride"})
    assert report.passed
    assert "declared to fail, which has no effect: a stride" in str(report)


def test_the_document_names_every_row_argument_and_strategy():
    page = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text("utf-8")
    for row in INVARIANTS:
        assert f"{row.id:<9} {row.title} " in page, row
        assert f"| {row.id}" in page or f", {row.id} |" in page, row
    for name in (*inspect.signature(check_policy).parameters, *strategies.__all__):
        assert name in page, name
    assert f"suite version {SUITE_VERSION}" in page
