"""Policies that decide in decode steps: their rows are at what a step reads, in table, figures and files."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from comparison_helpers import answer, example, small_settings
from PIL import Image
from test_table_and_plot import printed
from test_verify import edit_line, verify_unchanged

from kvprune.comparison import compare, read_run
from kvprune.comparison.display import curves, plot
from kvprune.comparison.display.notes import notes
from kvprune.comparison.display.paper import latex_table
from kvprune.comparison.display.records import Provenance, row_records
from kvprune.comparison.plan.grid import expand
from kvprune.comparison.statistics.summary import Summary, summarise

POLICIES = ("quest", "h2o:steps=2", "norm:reach=onward")
QUEST, STEPS, NORM = (
    "quest:keep_ratio=0.25",
    "h2o:keep_ratio=0.25,steps=2",
    "norm:keep_ratio=0.25,reach=onward",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    folder = tmp_path_factory.mktemp("steps") / "results"
    return folder, compare(POLICIES, [0.25], settings_of(folder))


def settings_of(folder: Path, **changes: object) -> object:
    return dataclasses.replace(
        small_settings(folder), answer_attention=False, repetitions=0, **{"against": "norm", **changes}
    )


@pytest.fixture
def folder(finished: tuple[Path, Summary], tmp_path: Path) -> Path:
    return shutil.copytree(finished[0], tmp_path / "results")


def test_a_ratio_of_the_grid_is_what_a_step_reads(finished: tuple[Path, Summary]) -> None:
    full, quest, steps, norm = finished[1].rows
    assert (quest.spec, steps.spec, norm.spec) == (QUEST, STEPS, NORM)
    assert (quest.kept_fraction, quest.bytes_held) == (1.0, full.bytes_held)
    assert quest.read == pytest.approx(0.25, abs=0.01)
    assert not quest.misses_budget
    assert steps.kept_fraction == 1.0
    assert 0.25 < steps.read <= 1
    assert steps.misses_budget
    assert steps.bytes_held < 0.3 * full.bytes_held
    assert norm.read_fraction is full.read_fraction is None
    assert norm.read == norm.kept_fraction == pytest.approx(0.25, abs=0.01)


def test_table_notes_and_files_say_both(finished: tuple[Path, Summary]) -> None:
    summary = finished[1]
    lines = printed(summary, 160)
    assert " kept % read % MiB/stock " in " ".join(lines[0].split())
    (row,) = (line for line in lines if line.startswith("quest"))
    assert row.split()[:5] == ["quest", "25", "%", "100.0", "25.0"]
    text = "\n".join(notes(summary))
    assert "read % is what a decode step reads, mean over steps; quest, h2o:steps=2 decide that" in text
    assert f"Careful: {STEPS} read in a step " in text
    assert "Careful: quest" not in text
    records = {record["spec"]: record for record in row_records(summary)}
    assert records[QUEST]["read_fraction"] == pytest.approx(0.25, abs=0.01)
    assert records[NORM]["read_fraction"] == records[NORM]["kept_fraction"]
    made = Provenance(
        **{field.name: field.name for field in dataclasses.fields(Provenance) if field.name != "guide"}
    )
    assert "Kept & Read & MiB" in latex_table(summary, made)
    written = json.loads((finished[0] / "summary.json").read_text())["rows"]
    assert ["read_fraction" in row for row in written] == [False, True, True, False]
    stored = [json.loads(line) for line in (finished[0] / "results.jsonl").read_text().splitlines()]
    assert {row["spec"] for row in stored if "read_fraction" in row} == {QUEST, STEPS}


def test_figures_place_a_row_at_what_it_reads(finished: tuple[Path, Summary], tmp_path: Path) -> None:
    summary = finished[1]
    assert plot._kept_label(summary) == "visible tokens read in a decode step (log scale)"
    place = curves.curves(summary)
    assert place["quest"][0].read == pytest.approx(place["norm:reach=onward"][0].read, abs=0.01)
    (tmp_path / "figure.png").write_bytes(plot.render(summary))
    assert Image.open(tmp_path / "figure.png").format == "PNG"
    plain = dataclasses.replace(summary, rows=(summary.rows[0], summary.rows[3]))
    assert plot._kept_label(plain) == "visible tokens kept (log scale)"
    assert "read" not in printed(plain, 160)[0].split("[95")[0]


def test_a_folder_reproduces_and_a_changed_fraction_is_named(folder: Path) -> None:
    assert verify_unchanged(folder).reproduces
    edit_line(folder, QUEST, "read-0001", read_fraction=0.5)
    found = verify_unchanged(folder)
    assert not found.reproduces
    assert any("read_fraction was 0.5 and is now 0.2" in one.what for one in found.differences)


def test_a_folder_grows_by_a_policy_that_decides_in_steps(tmp_path: Path) -> None:
    """Lines and summaries from before there were such policies have no such field, and are read."""
    folder = tmp_path / "results"
    before = compare(["norm:reach=onward"], [0.25], settings_of(folder))
    assert "read_fraction" not in (folder / "results.jsonl").read_text()
    assert "read_fraction" not in (folder / "summary.json").read_text()
    after = compare(["norm:reach=onward", "quest"], [0.25], settings_of(folder))
    assert [row.spec for row in after.rows] == ["full", NORM, QUEST]
    assert after.rows[1].accuracy == before.rows[1].accuracy
    assert after.rows[2].read == pytest.approx(0.25, abs=0.01)
    assert len(read_run(folder).answers) == 12


def test_one_answer_that_took_no_step_counts_as_kept() -> None:
    one, other = example(0), example(1)
    configurations = expand(["quest"], [0.25])
    answers = {}
    for asked in (one, other):
        answers["full", None, asked.id] = answer("full", asked, "7")
        answers[QUEST, None, asked.id] = answer(QUEST, asked, "7")
    answers[QUEST, None, one.id] = dataclasses.replace(answers[QUEST, None, one.id], read_fraction=0.25)
    summary = summarise(
        configurations, [one, other], answers, {}, batch_size=1, device="cpu", reread=True, against="quest"
    )
    assert summary.rows[1].read == pytest.approx((0.25 + 1) / 2)
