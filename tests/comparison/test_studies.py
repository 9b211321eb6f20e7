"""Whole studies on the embedded demo: the same path as those of Llama-3.2-Vision."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from comparison_helpers import contents
from rich.console import Console

from kvprune.comparison import (
    Overrides,
    Plan,
    Progress,
    Study,
    StudyTable,
    describe_folder,
    find_study,
    plan_study,
    run_study,
)
from kvprune.comparison.execution.generation import Generator
from kvprune.errors import DataError, KVPruneError, ResultsError, StudyError

demo = pytest.importorskip("kvprune.demo")
pytestmark = pytest.mark.skipif(not hasattr(demo, "load"), reason="the demo model is not there yet")

LLAMA = "llama-3.2-11b-vision"
FILES = ("seed-bench/questions.jsonl", "mme/questions.jsonl", "pope/questions.jsonl")
FOLDERS = ("seed-bench-images", "mme-share-of-right-answers", "pope-accuracy")
SPECS = (
    "full",
    "trim:k_ratio=0.25",
    "trim:k_ratio=0.05",
    "random:keep_ratio=0.615,reach=onward",
    "random:keep_ratio=0.142,reach=onward",
)


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of the demo where the study of the 11B model expects its benchmarks."""
    folder = tmp_path_factory.mktemp("benchmarks")
    for number, file in enumerate(FILES):
        task = demo.TASKS[number % len(demo.TASKS)]
        table = demo.write_dataset(folder / Path(file).parent, tasks=(task,), per_task=4, seed=number)
        table.rename(folder / file)
    return folder


def llama(**changes: Any) -> Study:
    """The study of the 11B model as it is, but quick."""
    study = find_study(LLAMA)
    return replace(study, settings=replace(study.settings, repetitions=0, max_new_tokens=3, **changes))


def plan(study: Study, output: Path, benchmarks: Path | None, limit: int = 3, **changes: Any) -> Plan:
    overrides = Overrides(model=str(demo.model_path()), device="cpu", limit=limit)
    return plan_study(study, output=output, data_folder=benchmarks, overrides=overrides, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, benchmarks: Path) -> tuple[Path, StudyTable]:
    output = tmp_path_factory.mktemp("study") / "out"
    return output, run_study(plan(llama(), output, benchmarks))


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded although nothing was left to do")

    monkeypatch.setattr(Generator, "load", refuse)


def shown(table: StudyTable, width: int = 200, **options: Any) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(table.rich(**options))
    return console.file.getvalue()  # type: ignore[attr-defined]


def answers(folder: Path) -> list[str]:
    return sorted((folder / "results.jsonl").read_text().splitlines())


def test_a_study_writes_a_results_folder_for_each_data_set_and_one_table(
    finished: tuple[Path, StudyTable],
) -> None:
    output, table = finished
    assert {one.name for one in output.iterdir()} == {*FOLDERS, "table.md", "table.csv", "study.json"}
    for folder, summary in zip(FOLDERS, table.summaries, strict=True):
        described = describe_folder(output / folder)
        assert described.specs == SPECS
        assert (described.examples, described.missing) == (3, 0)
        assert json.loads((output / folder / "summary.json").read_text()) == json.loads(
            json.dumps(summary.to_dict())
        )


def test_the_table_has_data_sets_as_rows_and_the_full_cache_first(finished: tuple[Path, StudyTable]) -> None:
    output, table = finished
    text = (output / "table.md").read_text()
    assert text == table.markdown()
    head, _, *rows = (line for line in text.splitlines() if line.startswith("|"))
    assert [cell.strip() for cell in head.split("|")[3:6]] == [
        "full",
        r"trim k\_ratio=0.25",
        r"trim k\_ratio=0.05",
    ]
    assert len(rows) == 3 * len(FILES)
    for number, summary in enumerate(table.summaries):
        right, kept, held = ([c.strip() for c in row.split("|")[3:-1]] for row in rows[3 * number :][:3])
        for place, row in enumerate(summary.rows):
            assert right[place].startswith(f"{100 * row.accuracy.value:.1f} ")
            assert kept[place] == f"{100 * row.kept_fraction:.1f}"
            assert held[place] == f"{row.bytes_held / 2**20:.4g}"


def test_the_notes_say_where_numbers_come_from_and_what_was_measured(
    finished: tuple[Path, StudyTable],
) -> None:
    output, table = finished
    notes = "\n".join(table.notes())
    for one in llama().notes:
        assert one in notes
    assert "Plain generate" in notes
    changed = (
        f"model {demo.model_path()} and not meta-llama/Llama-3.2-11B-Vision-Instruct, at most 3 examples"
    )
    assert f"Careful: not as the study file states: {changed}" in notes
    assert f"Model {demo.model_path()} (bfloat16) on cpu, seed 0, batches of 8." in notes
    assert "Careful: random:reach=onward drew once" in notes
    assert "SEED-Bench (images): 3 questions; always giving the most frequent answer" in notes
    assert str(output / FOLDERS[0]) in notes
    assert "Not finished" not in notes
    assert "prefill" not in shown(table)


def test_csv_and_json_have_every_configuration_of_every_data_set(finished: tuple[Path, StudyTable]) -> None:
    output, table = finished
    rows = list(csv.DictReader(io.StringIO((output / "table.csv").read_text())))
    assert [(row["data_set"], row["spec"]) for row in rows] == [
        (part.data.title, spec) for part in table.plan.parts for spec in SPECS
    ]
    stored = json.loads((output / "study.json").read_text())
    assert stored["file_sha256"] == table.plan.study.sha256
    assert stored["overrides"]["model"] == str(demo.model_path())
    assert all(one["finished"] for one in stored["data"])
    assert [row["value"] for row in stored["rows"]] == [float(row["value"]) for row in rows]


def test_intervals_go_where_a_terminal_is_narrow(finished: tuple[Path, StudyTable]) -> None:
    assert "right % [95 %]" in shown(finished[1])
    narrow = shown(finished[1], intervals=False)
    assert "right %" in narrow
    assert "[" not in narrow


@pytest.mark.usefixtures("no_model")
def test_a_finished_study_is_only_summarised_again(
    finished: tuple[Path, StudyTable], tmp_path: Path, benchmarks: Path, drawn: None
) -> None:
    output = shutil.copytree(finished[0], tmp_path / "out")
    before = contents(output)
    planned = plan(llama(), output, benchmarks)
    assert all(part.there is not None and not part.there.missing for part in planned.parts)
    again = run_study(planned)
    assert again.records() == finished[1].records()
    after = contents(output)
    del before["table.md"], after["table.md"], before["study.json"], after["study.json"]  # name the folder
    assert after == before


def test_an_interrupted_study_goes_on_and_ends_the_same(
    finished: tuple[Path, StudyTable], tmp_path: Path, benchmarks: Path
) -> None:
    output, title = tmp_path / "out", "MME (share of right answers)"
    phases = []

    def interrupt(progress: Progress) -> None:
        phases.append(progress.phase)
        if progress.phase == f"{title}: answering" and progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(plan(llama(), output, benchmarks), interrupt)
    text = (output / "table.md").read_text()
    assert r"Not finished: MME \(share" in text or "Not finished: MME (share" in text
    assert "SEED-Bench" in text
    kept = answers(output / FOLDERS[0])
    planned = plan(llama(), output, benchmarks)
    assert [part.there is None for part in planned.parts] == [False, False, True]
    table = run_study(planned)
    assert table.records() == finished[1].records()
    assert answers(output / FOLDERS[0]) == kept
    for folder in FOLDERS:
        assert answers(output / folder) == answers(finished[0] / folder)


def test_a_study_grows_by_policies_and_questions(
    finished: tuple[Path, StudyTable], tmp_path: Path, benchmarks: Path
) -> None:
    output = shutil.copytree(finished[0], tmp_path / "out")
    wider = replace(llama(), policies=("trim:k_ratio=0.05", "uniform:keep_ratio=0.3,reach=onward"))
    table = run_study(plan(wider, output, benchmarks, limit=4, only=[llama().data[0].title]))
    (summary,) = table.summaries
    assert summary.examples == 4
    assert "1 of 3 data sets" in "\n".join(table.notes())
    assert len(summary.rows) == len(SPECS) + 1
    columns = [record["spec"] for record in table.records()]
    assert columns == ["full", "trim:k_ratio=0.05", "uniform:keep_ratio=0.3,reach=onward"]
    assert set(answers(finished[0] / FOLDERS[0])) <= set(answers(output / FOLDERS[0]))
    assert not {FOLDERS[1]} - {one.name for one in output.iterdir()}


def test_times_stand_in_the_table_where_they_were_taken(tmp_path: Path, benchmarks: Path) -> None:
    study = llama()
    study = replace(study, policies=("trim:k_ratio=0.25",), settings=replace(study.settings, repetitions=1))
    table = run_study(plan(study, tmp_path / "out", benchmarks, limit=1, only=[study.data[0].title]))
    assert "prefill" in shown(table)
    assert "x1.00" in shown(table)
    assert any(note.startswith("prefill is") for note in table.notes())


def test_the_demo_writes_its_own_questions_and_more_of_them_later(tmp_path: Path) -> None:
    study = replace(find_study("demo"), policies=("trim:k_ratio=0.25",))
    study = replace(study, data=study.data[:1])
    output = tmp_path / "out"
    for limit in (1, 3):
        planned = plan_study(study, output=output, overrides=Overrides(limit=limit, device="cpu"))
        assert [part.examples for part in planned.parts] == [limit]
        assert (output / "demo.data").exists() == (limit == 3), "a plan writes nothing"
        table = run_study(planned)
        assert table.summaries[0].examples == limit
        assert table.to_dict()["data"][0]["file"].endswith("data.jsonl")
    notes = "\n".join(table.notes())
    assert "The last token of each prompt was read again" in notes
    assert "Model the embedded demo (float32) on cpu" in notes


# What is refused, before anything runs.


def refused(
    tmp_path: Path, error: type[KVPruneError], match: str, study: Study, benchmarks: Path | None, **more: Any
) -> None:
    output = tmp_path / "out"
    before = output.exists()
    with pytest.raises(error, match=match):
        plan(study, output, benchmarks, **more)
    assert output.exists() == before, "something was written"


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("policies", "ratios", "match"),
    [
        (["trimm"], [0.5], r"vision\.toml: keys 'policies' and 'keep_ratios': .*'trimm'"),
        (["trim:k=3"], [0.5], r"'policies' and 'keep_ratios': .*trim.*'k'"),
        (["trim:k_ratio=2"], [0.5], r"'policies' and 'keep_ratios': .*2"),
        (["trim"], [1.5], r"'policies' and 'keep_ratios': keep ratio 1\.5 is not a fraction"),
        (["trim"], [float("nan")], r"keep ratio nan is not a fraction"),
        (["trim"], [], r"'trim' states no budget, and there is no keep ratio"),
    ],
)
def test_wrong_policies_and_budgets(
    tmp_path: Path, benchmarks: Path, policies: Sequence[str], ratios: Sequence[float], match: str
) -> None:
    study = replace(llama(), policies=tuple(policies), keep_ratios=tuple(ratios))
    refused(tmp_path, StudyError, match, study, benchmarks)


@pytest.mark.usefixtures("no_model")
def test_wrong_names_and_values(tmp_path: Path, benchmarks: Path) -> None:
    refused(tmp_path, StudyError, "key 'against': there is no 'norm'", llama(against="norm"), benchmarks)
    refused(tmp_path, StudyError, "no data set 'POP'.*it has: SEED", llama(), benchmarks, only=["POP"])
    refused(tmp_path, StudyError, r"vision\.toml: limit is 0; .*at least 1", llama(), benchmarks, limit=0)
    study = find_study("demo")
    study = replace(study, data=(*study.data[:1], replace(study.data[1], demo_task="reed")))
    refused(tmp_path, StudyError, "'Counting', key 'demo_task': unknown task 'reed'", study, benchmarks)


@pytest.mark.usefixtures("no_model")
def test_missing_data_is_named_at_once(tmp_path: Path, benchmarks: Path) -> None:
    needs = "needs a folder of data that holds seed-bench/questions.jsonl, mme/q.*--data-folder"
    refused(tmp_path, StudyError, needs, llama(), None)
    folder = shutil.copytree(benchmarks, tmp_path / "data")
    for file in FILES[1:]:
        (folder / file).unlink()
    missing = f"data has no {FILES[1]}, {FILES[2]}; each must be a JSON-lines file"
    refused(tmp_path, DataError, missing, llama(), folder)
    assert plan(llama(), tmp_path / "out", folder, only=[llama().data[0].title]).parts[0].examples == 3


@pytest.mark.usefixtures("no_model")
def test_a_damaged_second_data_set_stops_the_study_before_the_first(tmp_path: Path, benchmarks: Path) -> None:
    folder = shutil.copytree(benchmarks, tmp_path / "data")
    file = folder / FILES[1]
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], lines[1].replace("answers", "answer"), *lines[2:]]))
    refused(tmp_path, DataError, r"mme.*line 2: field 'answers' is missing; is 'answer' ", llama(), folder)
    file.write_text("\n".join(lines))
    picture = file.parent / json.loads(lines[2])["image"]
    picture.write_bytes(picture.read_bytes()[:60])
    refused(tmp_path, DataError, r"mme.*line 3: field 'image': .*not a readable", llama(), folder)


@pytest.mark.usefixtures("no_model")
def test_a_metric_must_fit_the_data(tmp_path: Path, benchmarks: Path) -> None:
    study = llama()
    study = replace(study, data=tuple(replace(one, metric="word_error_rate") for one in study.data))
    match = "'SEED-Bench .images.', key 'metric' is 'word_error_rate', but .* about pictures, .* 'accuracy'"
    refused(tmp_path, StudyError, match, study, benchmarks)


@pytest.mark.usefixtures("no_model")
def test_a_damaged_results_folder_stops_the_study_before_it_runs(
    finished: tuple[Path, StudyTable], tmp_path: Path, benchmarks: Path
) -> None:
    output = shutil.copytree(finished[0], tmp_path / "out")
    results = output / FOLDERS[2] / "results.jsonl"
    results.write_text(results.read_text().replace("{", "(", 1))
    refused(tmp_path, ResultsError, r"pope-accuracy.*line 1 is damaged", llama(), benchmarks)
    shutil.rmtree(output / FOLDERS[2])
    (output / FOLDERS[2]).mkdir()
    (output / FOLDERS[2] / "mine.txt").write_text("mine")
    refused(tmp_path, ResultsError, "pope-accuracy is not a results folder", llama(), benchmarks)
    shutil.rmtree(output)
    output.write_text("a file")
    refused(tmp_path, StudyError, "out is no folder", llama(), benchmarks)
