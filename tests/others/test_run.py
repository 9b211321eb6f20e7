"""The test bed of others' tests, on a tiny checkout that these tests write themselves."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest
import transformers
from families import OLD
from run import Expectation, Expected, RefusedError, check_checkout, judge, main
from under_policy import UnderPolicy

import kvprune
from kvprune.adapters.tiny.models import tiny_bart

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(OLD, reason="this release imports torchvision to look a model up"),
]

FAKE_TESTS = """
import copy
import unittest
import torch
from kvprune.adapters.tiny.models import example_bart

MODEL, INPUTS = example_bart(torch.float64)
REFERENCE = MODEL.generate(**INPUTS, max_new_tokens=3, output_scores=True, return_dict_in_generate=True)


class BartModelTest(unittest.TestCase):
    def test_generates(self):
        self.assertEqual(MODEL.generate(**INPUTS, max_new_tokens=3).shape[0], INPUTS["input_ids"].shape[0])

    def test_scores_are_those_of_the_full_cache(self):
        out = MODEL.generate(**INPUTS, max_new_tokens=3, output_scores=True, return_dict_in_generate=True)
        torch.testing.assert_close(out.scores[-1], REFERENCE.scores[-1])

    def test_gradient_checkpointing(self):
        model = copy.deepcopy(MODEL).train()
        model.gradient_checkpointing_enable()
        model(**INPUTS)

    def test_of_a_configuration(self):
        self.assertTrue(MODEL.config.is_encoder_decoder)

    def test_that_fails_anyway(self):
        MODEL(**INPUTS)
        self.fail("on every machine")

    @unittest.skip("no GPU")
    def test_that_is_skipped(self):
        pass

"""
SCORES = "bart::BartModelTest::test_scores_are_those_of_the_full_cache"
EXPECTED = f"""
[[expected]]
policies = ["norm"]
tests = ["{SCORES}"]
error = "AssertionError"
reason = "half of the tokens are gone"

[[expected]]
policies = ["norm"]
tests = ["bart::*::*_checkpointing"]
error = "UnsupportedModelError"
message = "gradient checkpointing of BART"
reason = "refused by name"

[decided.bart]
norm = 2
"""


def checkout(folder: Path, version: str = transformers.__version__) -> Path:
    source = folder / "src" / "transformers"
    source.mkdir(parents=True)
    (source / "__init__.py").write_text(f'__version__ = "{version}"\n')
    tests = folder / "tests" / "models" / "bart"
    tests.mkdir(parents=True)
    (tests / "test_modeling_bart.py").write_text(textwrap.dedent(FAKE_TESTS))
    return folder


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Run the script once; return its exit code and the folder with what it wrote."""
    folder = checkout(tmp_path_factory.mktemp("checkout"))
    output = tmp_path_factory.mktemp("output")
    expected = output / "expected.toml"
    expected.write_text(EXPECTED)
    options = ["--family", "bart", "--policy", "norm:keep_ratio=0.5", "--expected", str(expected)]
    return main([str(folder), *options, "--output", str(output)]), output


def outcomes(output, policy="norm-keep_ratio-0-5"):
    found = json.loads((output / f"bart-{policy}.json").read_text())
    return {test.split("::")[-1]: outcome for test, outcome in found.items()}


def test_an_empty_folder_is_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert f"{tmp_path} is no source checkout of transformers" in message
    assert f"at the tag v{transformers.__version__}" in message


def test_another_version_is_refused(tmp_path):
    with pytest.raises(
        RefusedError, match=rf"holds transformers 4\.0\.1, but {transformers.__version__} is installed"
    ):
        check_checkout(checkout(tmp_path, "4.0.1"), ["bart"])


def test_a_checkout_without_tests_of_a_family_is_refused(tmp_path):
    with pytest.raises(RefusedError, match=r"has no tests/models/whisper/test_modeling_whisper\.py"):
        check_checkout(checkout(tmp_path), ["bart", "whisper"])


def test_each_test_of_a_supported_model_runs_under_the_policy(ran):
    _, output = ran
    stock, norm = outcomes(output, "stock"), outcomes(output)
    assert {name: outcome["outcome"] for name, outcome in stock.items()} == {
        "test_generates": "passed",
        "test_scores_are_those_of_the_full_cache": "passed",
        "test_gradient_checkpointing": "passed",
        "test_of_a_configuration": "passed",
        "test_that_fails_anyway": "failed",
        "test_that_is_skipped": "skipped",
    }
    assert set(norm) == {
        "test_generates",
        "test_scores_are_those_of_the_full_cache",
        "test_gradient_checkpointing",
    }
    assert norm["test_generates"]["prefills"] == 1
    assert norm["test_generates"]["outcome"] == "passed"
    assert norm["test_scores_are_those_of_the_full_cache"]["error"] == "AssertionError"


def test_expected_failures_are_no_problem(ran):
    code, output = ran
    assert outcomes(output)["test_gradient_checkpointing"]["error"] == "UnsupportedModelError"
    assert code == 0


def test_failures_that_nobody_expects_are_reported(ran):
    _, output = ran
    found = json.loads((output / "bart-norm-keep_ratio-0-5.json").read_text())
    verdict = judge("bart", "norm:keep_ratio=0.5", found, Expected((), {}))
    assert (verdict.tests, verdict.passed, verdict.as_expected, verdict.decided) == (3, 1, 0, 2)
    assert [problem.split(" fails")[0] for problem in verdict.problems] == [
        "bart::BartModelTest::test_gradient_checkpointing",
        SCORES,
    ]


def failing(**changes):
    fields = {"policies": ("norm",), "tests": (SCORES,), "error": "AssertionError", "reason": "fewer tokens"}
    return Expected((Expectation(**{**fields, **changes}),), {"bart": {"norm": 1}})


def one(outcome, error="", message="", prefills=1):
    entry = {"outcome": outcome, "error": error, "message": message, "prefills": prefills}
    return {f"tests/models/bart/test_modeling_bart.py::{SCORES.removeprefix('bart::')}": entry}


def problems(outcomes, expected, policy="norm:keep_ratio=0.5", **options):
    return "\n".join(judge("bart", policy, outcomes, expected, **options).problems)


def test_an_expected_failure_that_passes_is_reported():
    assert f"{SCORES} passes, but is expected to fail: fewer tokens" in problems(one("passed"), failing())
    assert not problems(one("passed"), failing(sometimes=True))
    assert not problems(one("passed"), failing(), "full")


def test_another_error_than_the_expected_one_is_reported():
    assert not problems(one("failed", "AssertionError", "1 != 2"), failing())
    assert "another failure is expected" in problems(one("failed", "KeyError", "1"), failing())
    assert "another failure is expected" in problems(
        one("failed", "AssertionError", "1 != 2"), failing(message="Lists differ")
    )
    assert "AssertionError: 1 != 2" in problems(one("failed", "AssertionError", "1 != 2"), failing(), "trim")


def test_a_test_that_did_not_finish_is_reported():
    assert "did not finish: None" in problems(one(None), failing())
    assert "did not finish: skipped" in problems(one("skipped"), failing())


def test_policies_that_decide_in_fewer_tests_are_reported():
    failure = one("failed", "AssertionError", prefills=0)
    assert "the policy decided in 0 tests; at least 1 are expected" in problems(failure, failing())
    assert not problems(failure, failing(), partly=True)


def test_an_entry_without_a_reason_is_refused(tmp_path):
    path = tmp_path / "expected.toml"
    path.write_text('[[expected]]\npolicies = ["norm"]\ntests = ["a"]\nerror = "KeyError"\nreason = " "\n')
    with pytest.raises(RefusedError, match=r"entry 1 of expected\.toml needs policies, tests and a reason"):
        Expected.read(path)
    path.write_text('[[expected]]\npolicies = ["norm"]\ntests = ["a"]\nreason = "b"\n')
    with pytest.raises(RefusedError, match=r"entry 1 of expected\.toml: .*'error'"):
        Expected.read(path)


def test_the_list_of_expected_failures_is_in_order():
    expected = Expected.read(Path(__file__).with_name("expected.toml"))
    assert {name for each in expected.failures for name in each.policies} <= set(kvprune.list_policies())


def test_a_model_runs_under_the_policy_until_the_test_ends():
    call, generate = vars(transformers.PreTrainedModel).get("__call__"), transformers.GenerationMixin.generate
    model = tiny_bart()
    under_policy = UnderPolicy("norm:keep_ratio=0.5")
    under_policy.start()
    model.model(**model.dummy_inputs)  # a part first, then the whole
    model.generate(**{"input_ids": model.dummy_inputs["input_ids"]}, max_new_tokens=3)
    part, whole = under_policy.stop()
    assert part.report.prefills == whole.report.prefills == 1
    assert not whole.is_attached
    assert vars(transformers.PreTrainedModel).get("__call__") is call
    assert transformers.GenerationMixin.generate is generate
