"""`kvprune verify` as a user meets it: a verdict, differences, exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from kvprune.cli import app
from kvprune.comparison.verification.verification import DEFAULT_SAMPLE

ROOT = Path(__file__).parents[2]


def run(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "results"
    small = [
        "--policy",
        "trim",
        "--keep-ratios",
        "0.1",
        "--tasks",
        "read",
        "--limit",
        "2",
        "--repetitions",
        "0",
    ]
    run("compare", "--output", str(folder), "--max-new-tokens", "2", "--batch-size", "1", *small)
    return folder


@pytest.fixture
def edited(compared: Path, tmp_path: Path) -> Path:
    """A copy in which one answer of trim is another one."""
    folder = shutil.copytree(compared, tmp_path / "edited")
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    next(row for row in rows if row["spec"] != "full" and row["id"] == "read-0001")["answer"] = "none"
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_verdict_in_one_line_and_code_0(compared: Path) -> None:
    out = run("verify", str(compared)).stdout
    assert out == (
        "reproduces: 6 of 6 answers, 6 of 6 receipts "
        "(6 batches run again; all 6 lines and the summary checked)\n"
    )
    sampled = run("verify", str(compared), "--sample", "1", "--seed", "3").stdout
    assert sampled.startswith("reproduces: 2 of 2 answers, 2 of 2 receipts (2 batches")


def test_differences_by_spec_and_example_and_code_1(edited: Path) -> None:
    out = run("verify", str(edited), "--all", code=1).stdout
    assert "does not reproduce: 5 of 6 answers, 6 of 6 receipts" in out
    assert '  trim:keep_ratio=0.1, example read-0001: answer was "none" and is now "' in out


def test_json_is_all_of_standard_output(edited: Path, compared: Path) -> None:
    found = json.loads(run("verify", str(compared), "--all", "--json").stdout)
    assert (found["reproduces"], found["differences"], found["notes"]) == (True, [], [])
    found = json.loads(run("verify", str(edited), "--all", "--json", code=1).stdout)
    assert not found["reproduces"]
    named = {one["example"] for one in found["differences"]}
    assert named - {None} == {"read-0001"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there are no results at nowhere"),
        ([".", "--sample", "0"], "sample is 0; it must be at least 1"),
        (["."], ". is not a results folder: it holds 'novel.txt' but no manifest.json"),
    ],
)
def test_what_a_user_can_correct_is_one_line_and_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "novel.txt").write_text("chapter one")
    err = run("verify", *arguments, code=2).stderr
    assert err.splitlines()[-1].startswith(f"kvprune: error: {message}")


def test_documentation_names_every_option_of_verify() -> None:
    page = (ROOT / "docs" / "results-folder.md").read_text(encoding="utf-8")
    command = typer.main.get_command(app).commands["verify"]  # type: ignore[attr-defined]
    for parameter in command.params:
        for flag in parameter.opts:
            if flag.startswith("--") and flag not in ("--help", "--debug"):
                assert f"`{flag}" in page, f"docs/results-folder.md does not explain {flag}"
    assert {p.name: p.default for p in command.params}["sample"] == DEFAULT_SAMPLE
