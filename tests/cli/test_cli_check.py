"""`kvprune check` as a user meets it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from kvprune import cli
from kvprune.session import registry

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
    for module in ("policies.suite", "common.reproducers"):
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
        (
            ["BartAdaptor"],
            "no installed adapter is called 'BartAdaptor' or supports a model of that name; did",
        ),
        (["BartAdapter", "--only", "KV14"], "nothing 'KV14' is checked of an adapter"),
    ],
)
def test_user_errors_are_one_line_with_code_2(arguments: list[str], message: str) -> None:
    out, err = run(*arguments, code=2)
    assert out == ""
    assert err.startswith("kvprune: error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["WhisperForConditionalGeneration", "WhisperAdapter"])
def test_an_adapter_by_its_name_or_by_that_of_a_model(name: str) -> None:
    out, err = run(name, "--only", "class,KV06", code=0)
    assert "class   declaration, probes, every cross layer   passed" in out
    assert out.splitlines()[-1].startswith("WhisperAdapter passed: 2 passed (")
    assert "max_new_tokens" not in err


def with_adapters(monkeypatch: pytest.MonkeyPatch, *classes: type) -> None:
    """As if a plugin provided these adapters, too."""
    real = registry.load()
    entries = [registry.AdapterEntry(cls, "zoo", "kvprune-zoo") for cls in classes]
    more = registry.Registry(real.policies, (*real.adapters, *entries), real.broken)
    monkeypatch.setattr("kvprune.testing.conformance.adapters.suite.load", lambda: more)


def test_an_adapter_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.adapters import LeavesAHook

    with_adapters(monkeypatch, LeavesAHook)
    out, _ = run("LeavesAHook", "--only", "KV12", code=1)
    assert "KV12 nothing is left behind: failed" in out
    assert "check_adapter(LeavesAHook, only=['KV12'])" in out
    assert "LeavesAHook FAILED: 1 failed" in out


def test_an_adapter_without_an_example_is_told_what_to_add(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvprune.adapters.encoder_decoder import EncoderDecoderAdapter

    class OwnAdapter(EncoderDecoderAdapter):
        family = "own"
        model_classes = ("OwnForConditionalGeneration",)

    with_adapters(monkeypatch, OwnAdapter)
    _, err = run("OwnForConditionalGeneration", code=2)
    assert err.count("\n") == 1
    assert "OwnAdapter does not say how to make a tiny example; give it a classmethod example" in err
    assert "kvprune.testing.check_adapter(OwnAdapter, make_model, make_inputs)" in err


def test_a_model_of_several_adapters_is_asked_about_by_an_adapters_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from zoo.adapters import LeavesAHook

    with_adapters(monkeypatch, LeavesAHook)
    _, err = run("BartModel", code=2)
    assert "BartModel is claimed by several adapters" in err
    assert "zoo.adapters.LeavesAHook; give an adapter's name" in err
