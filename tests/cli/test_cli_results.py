"""`kvprune results` as a user meets it: list, export, diff, tau."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvprune.cli import app
from kvprune.text import is_printable


def run(*arguments: str | Path, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["results", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "first"
    small = "--policy trim --keep-ratios 0.1 --tasks read --limit 3 --repetitions 0 --max-new-tokens 2"
    done = CliRunner().invoke(
        app, ["compare", "--output", str(folder), "--no-answer-attention", *small.split()]
    )
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def place(compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None) -> Path:
    """The current folder, with two results folders in it."""
    shutil.copytree(compared, tmp_path / "first")
    shutil.copytree(compared, tmp_path / "second")
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_list_shows_the_folders_here_or_those_named(place: Path) -> None:
    lines = run("list").stdout.splitlines()
    assert [line.split()[0] for line in lines if "pictures" in line] == ["first", "second"]
    assert "6 of 6" in lines[2]
    assert len(run("list", "first").stdout.splitlines()) == len(lines) - 1
    found = json.loads(run("list", "--json").stdout)
    assert [(one["folder"], one["answers"], one["missing"]) for one in found] == [
        ("first", 6, 0),
        ("second", 6, 0),
    ]


def test_list_goes_on_where_a_folder_is_damaged(place: Path) -> None:
    (place / "second" / "manifest.json").write_text("{")
    done = run("list")
    assert "cannot be read" in done.stdout
    assert "6 of 6" in done.stdout
    assert "second cannot be read" in done.stderr
    run("list", "second", code=2)
    run("list", "else", code=2)


def test_list_of_nothing_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "there are no results folders here" in run("list", code=2).stderr


@pytest.mark.parametrize("form", ["csv", "markdown", "latex"])
def test_text_goes_to_standard_output_or_a_file(place: Path, form: str) -> None:
    printed = run("export", "first", "--format", form)
    assert not printed.stderr
    done = run("export", "first", "--format", form, "--output", "table.txt")
    assert done.stdout == ""
    assert "wrote table.txt" in done.stderr
    assert (place / "table.txt").read_bytes().decode() == printed.stdout_bytes.decode()
    assert "trim" in printed.stdout


def test_every_answer_is_exported(place: Path) -> None:
    text = run("export", "first", "--format", "csv", "--answers").stdout_bytes.decode()
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    written = [json.loads(line) for line in (place / "first" / "results.jsonl").read_text().splitlines()]
    assert len(rows) == len(written) == 6
    assert {row["receipt"] for row in rows} == {row["receipt"] for row in written}


def test_parquet_needs_a_file(place: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    assert "name a file with --output" in run("export", "first", "--format", "parquet", code=2).stderr
    run("export", "first", "--format", "parquet", "--output", "table.parquet")
    assert parquet.read_table(place / "table.parquet").num_rows == 2


def test_files_of_a_results_folder_are_not_written_over(place: Path) -> None:
    before = (place / "first" / "results.jsonl").read_bytes()
    for target in ("first/results.jsonl", "second/summary.json", "nowhere/table.csv", "else"):
        run("export", "first", "--format", "csv", "--output", target, code=2)
    assert (place / "first" / "results.jsonl").read_bytes() == before


def test_wrong_formats_and_folders_are_named(place: Path) -> None:
    assert "unknown format 'excel'" in run("export", "first", "--format", "excel", code=2).stderr
    assert "there are no results at else" in run("export", "else", "--format", "csv", code=2).stderr


def test_another_partner_can_be_asked_for(place: Path) -> None:
    text = run("export", "first", "--format", "csv", "--against", "full").stdout_bytes.decode()
    rows = {row["spec"]: row for row in csv.DictReader(io.StringIO(text, newline=""))}
    assert rows["trim:keep_ratio=0.1"]["partner"] == "full"
    assert rows["trim:keep_ratio=0.1"]["versus_partner_pairs"] == "3"


def test_diff_of_equal_folders(place: Path) -> None:
    text = run("diff", "first", "second").stdout
    assert text.count("all same") == 4
    assert "All recorded ingredients are equal." in text


def test_diff_names_what_changed(place: Path) -> None:
    small = "--policy trim --keep-ratios 0.1,0.5 --tasks read --limit 2 --repetitions 0 --max-new-tokens 4"
    CliRunner().invoke(app, ["compare", "--output", "third", "--no-answer-attention", *small.split()])
    text = run("diff", "first", "third").stdout
    assert "max_new_tokens was 2 and is now 4" in text
    assert "Only in the second folder: trim:keep_ratio=0.5." in text
    found = json.loads(run("diff", "first", "third", "--json").stdout)
    assert [row["examples"] for row in found["rows"]] == [2, 2]
    assert found["only_second"] == ["trim:keep_ratio=0.5"]


def test_tau_of_two_folders(place: Path) -> None:
    small = "--policy norm:reach=onward --policy trim --policy fastv --keep-ratios 0.1,0.5"
    small += " --tasks read --limit 3 --repetitions 0 --max-new-tokens 2"
    for name in ("third", "fourth"):
        done = CliRunner().invoke(app, ["compare", "--output", name, *small.split()])
        assert done.exit_code == 0, done.output
    text = run("tau", "third", "fourth").stdout
    assert [line.split()[0] for line in text.splitlines()[2:5]] == ["50", "10", "mean"]
    assert "Not ranked, because it looks at the answer: answer-attention." in text
    assert "Not ranked at each budget at which it kept another share: fastv." in text
    found = json.loads(run("tau", "first", "third", "--json").stdout)
    assert [(one["keep_ratio"], one["policies"]) for one in found] == [(0.1, ["trim"])]
    assert (found[0]["tau"], found[0]["p_value"]) == (None, None)
    text = run("tau", "first", "third").stdout
    assert "Only in one of the folders: fastv, norm:reach=onward." in text
    assert "- : fewer than two policies are in both folders" in text


def test_tau_names_what_is_wrong(place: Path) -> None:
    found = run("tau", "first", "second", "--keep-ratios", "0.3", code=2)
    assert "keep ratio 0.3 is not in both comparisons; in both are: 0.1" in found.stderr
    assert "keep ratio 'x' is no number" in run("tau", "first", "second", "--keep-ratios", "x", code=2).stderr
    assert "there are no results at" in run("tau", "first", "else", code=2).stderr


def test_what_others_wrote_is_printable(place: Path) -> None:
    manifest = json.loads((place / "first" / "manifest.json").read_text())
    manifest["about"]["model"] = "\x1b]0;owned\x07[bold]x[green]"
    manifest["created"] = "\x1b[2J"
    (place / "first" / "manifest.json").write_text(json.dumps(manifest))
    text = run("list").stdout
    assert is_printable(text.replace("\n", ""))
    assert "[bold]x[" in text
