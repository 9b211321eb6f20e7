"""`kvprune check` as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from kvprune import cli, registry

runner = CliRunner()


def run(*arguments: str, code: int) -> tuple[str, str]:
    """Run the command and return what it wrote to standard output and standard error."""
    result = runner.invoke(cli.app, ["check", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def test_a_policy_that_passes() -> None:
    out, _ = run("trim:k_ratio=0.1", "--only", "KV01,KV02", "--seed", "3", code=0)
    (row,) = (line for line in out.splitlines() if line.startswith("KV01"))
    assert row.split()[-3] == "passed"
    assert "KV02 not applicable: trim:k_ratio=0.1 states no budget" in out
    assert out.splitlines()[-1].startswith("trim:k_ratio=0.1 passed: 1 passed, 1 not applicable (")
    assert out.splitlines()[-1].endswith("seed 3)")


@pytest.fixture
def installed_stride(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a plugin provided a policy that breaks KV14."""
    from zoo.monotone import Stride

    real = registry.load()
    entry = registry.PolicyEntry("stride", Stride, "zoo", "kvprune-zoo", 1)
    broken = registry.Registry({**real.policies, "stride": entry}, real.adapters, real.broken)
    for module in ("suite", "reproduce"):
        monkeypatch.setattr(f"kvprune.testing.conformance.{module}.load", lambda: broken)


@pytest.mark.usefixtures("installed_stride")
def test_a_policy_that_fails() -> None:
    out, _ = run("stride", "--only", "KV14", code=1)
    assert "KV14 a larger budget keeps a superset: failed" in out
    assert "reproduce with:" in out
    assert "policy = kvprune.get_policy('stride" in out
    assert "stride FAILED: 1 failed" in out


@pytest.mark.usefixtures("installed_stride")
def test_a_declared_failure_passes() -> None:
    out, _ = run("stride", "--only", "KV14", "--expect-failure", "KV14=a stride is not nested", code=0)
    assert "declared: a stride is not nested" in out
    assert "stride passed: 1 expected failure" in out


def test_a_declared_failure_that_passes_fails() -> None:
    out, _ = run("random", "--only", "KV14", "--expect-failure", "KV14=no idea", code=1)
    assert "declared to fail (no idea), but it passed" in out


def test_json_is_all_of_standard_output() -> None:
    out, _ = run("full", "--only", "class,KV07", "--json", code=0)
    data = json.loads(out)
    assert data["passed"] is True
    assert [result["id"] for result in data["results"]] == ["class", "KV07"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trimm"], "unknown policy 'trimm'; did you mean 'trim'"),
        (["trim:keep=1"], "policy 'trim' has no option 'keep'"),
        (["trim", "--only", "KV99"], "no invariant 'KV99'"),
        (["trim", "--expect-failure", "KV14"], "expected ID=REASON such as KV14='not nested', got 'KV14'"),
        (["trim", "--expect-failure", "KV99=x"], "no invariant 'KV99'"),
    ],
)
def test_user_errors_are_one_line_with_code_2(arguments: list[str], message: str) -> None:
    out, err = run(*arguments, code=2)
    assert out == ""
    assert err.startswith("kvprune: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_missing_hypothesis_is_one_line() -> None:
    code = (
        "import sys; sys.modules['hypothesis'] = None; sys.argv = ['kvprune', 'check', 'full'];"
        "import runpy; runpy.run_module('kvprune', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        "kvprune: error: the conformance suite needs hypothesis, which is not installed: "
        'pip install "kvprune[test]"\n'
    )
