"""The command `kvprune study`: lists, checks, runs and prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from command_line import kvprune_command

from kvprune.cli import app
from kvprune.comparison.execution.generation import Generator
from kvprune.comparison.studies.study import built_in_studies

demo = pytest.importorskip("kvprune.demo")
pytestmark = pytest.mark.skipif(not hasattr(demo, "load"), reason="the demo model is not there yet")

PAGE = (Path(__file__).parents[2] / "docs" / "studies.md").read_text(encoding="utf-8")
SMALL = """
title = "A small study"
notes = ["Nothing follows from two questions."]
policies = ["trim:k_ratio=0.25"]
max_new_tokens = 3
repetitions = 0
answer_attention = false
[[data]]
title = "First"
metric = "accuracy"
demo_task = "{first}"
limit = 2
[[data]]
title = "Second"
metric = "accuracy"
file = "second.jsonl"
source = "the demo"
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.toml"
    path.write_text(SMALL.format(first=demo.TASKS[0]), encoding="utf-8")
    table = demo.write_dataset(tmp_path / "data", tasks=(demo.TASKS[1],), per_task=2)
    table.rename(table.with_name("second.jsonl"))
    return path


def test_without_a_name_the_studies_are_listed() -> None:
    out = " ".join(kvprune_command("study").split())
    for name in built_in_studies():
        assert name in out
    assert "not run: gated weights" in out


def test_print_shows_the_file_as_it_is() -> None:
    out = kvprune_command("study", "llama-3.2-90b-vision", "--print")
    assert out == built_in_studies()["llama-3.2-90b-vision"].read_text("utf-8")


def test_check_lists_what_would_run_and_writes_nothing(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Generator, "load", None)  # loading anything fails
    before = sorted(small.parent.rglob("*"))
    out = kvprune_command("study", "small.toml", "--data-folder", "data", "--check")
    for text in (
        "First", "Second", "data/second.jsonl", "the demo", "A small study", "full, trim:k_ratio=0.25",
        "8 answers in all", "Nothing was run.", "Nothing follows from two questions.",
    ):  # fmt: skip
        assert text in out, text
    assert sorted(small.parent.rglob("*")) == before
    out = kvprune_command("study", "small.toml", "--data-folder", "data", "--check", "--json", code=2)
    assert "--check makes no table" in out


def test_a_study_runs_and_prints_its_table_and_then_json(small: Path) -> None:
    arguments = ("study", "small.toml", "--data-folder", "data", "--device", "cpu")
    out = kvprune_command(*arguments)
    for text in (
        "A small study", "First", "Second", "n = 2", "k_ratio=0.25", "right %", "kept %", "MiB",
        "Nothing follows from two questions.", "table.md, table.csv and study.json",
    ):  # fmt: skip
        assert text in out, text
    assert (small.parent / "kvprune-study-small" / "second" / "manifest.json").exists()
    stored = json.loads(kvprune_command(*arguments, "--json"))
    assert stored == json.loads((small.parent / "kvprune-study-small" / "study.json").read_text())
    assert len(stored["rows"]) == 4
    assert "Careful: not as the study file states" not in out
    checked = kvprune_command(*arguments, "--check")
    assert checked.count("4 of 4") == 2
    one = json.loads(kvprune_command(*arguments, "--only", "Second", "--limit", "2", "--json"))
    assert [row["data_set"] for row in one["rows"]] == ["Second", "Second"]


def test_a_mistake_is_one_line_and_exit_code_2(small: Path) -> None:
    for arguments, message in (
        (("study", "smal"), "there is no study 'smal'"),
        (("study", "small.toml"), "needs a folder of data that holds second.jsonl"),
        (("study", "small.toml", "--data-folder", "."), "has no second.jsonl"),
        (("study", "small.toml", "--data-folder", "data", "--batch-size", "0"), "batch_size is 0"),
    ):
        error = kvprune_command(*arguments, code=2)
        assert message in error
        assert len(error.splitlines()) == 1, error
    assert not (small.parent / "kvprune-study-small").exists()


def test_the_page_names_every_option() -> None:
    command = typer.main.get_command(app).commands["study"]  # type: ignore[attr-defined]
    for parameter in command.params:
        for flag in parameter.opts:
            if flag.startswith("--") and flag != "--help":
                assert f"`{flag}`" in PAGE, f"docs/studies.md does not explain {flag}"
