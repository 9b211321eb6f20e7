"""A whole comparison on the embedded demo: what it writes, how it resumes, what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import kvprune
from kvprune.comparison import Progress, Settings, Summary, compare
from kvprune.comparison.data.examples import read_examples
from kvprune.comparison.execution.generation import Generator
from kvprune.comparison.execution.questions import PictureGenerator
from kvprune.comparison.plan import grid
from kvprune.errors import (
    DataError,
    KVPruneError,
    PolicyOptionError,
    ResultsError,
    UnknownPolicyError,
    UnsupportedModelError,
)

demo = pytest.importorskip("kvprune.demo")
pytestmark = pytest.mark.skipif(not hasattr(demo, "load"), reason="the demo model is not there yet")

POLICIES = ("trim", "norm:reach=onward", "lossless")
RATIOS = (0.25,)
SPECS = ("full", "trim:keep_ratio=0.25", "norm:keep_ratio=0.25,reach=onward", "lossless")


def settings(output: Path, **changes: Any) -> Settings:
    small = {"tasks": ("read", "count"), "limit": 2, "batch_size": 3, "max_new_tokens": 3, "repetitions": 0}
    return Settings(output=output, **{"answer_attention": False, **small, **changes})


def run(output: Path, on_progress: Callable[[Progress], None] = lambda _: None, **changes: Any) -> Summary:
    return compare(POLICIES, RATIOS, settings(output, **changes), on_progress)


def lines(folder: Path) -> list[str]:
    return sorted((folder / "results.jsonl").read_text().splitlines())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    folder = tmp_path_factory.mktemp("finished") / "results"
    return folder, run(folder, repetitions=2)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded although nothing was left to do")

    monkeypatch.setattr(Generator, "load", refuse)


def test_results_folder_is_complete(finished: tuple[Path, Summary]) -> None:
    folder, summary = finished
    names = {
        "results.jsonl",
        "timings.jsonl",
        "summary.json",
        "manifest.json",
        "accuracy_vs_kept.png",
        "cost_vs_accuracy.png",
        "data",
    }
    assert {one.name for one in folder.iterdir()} == names
    rows = [json.loads(line) for line in lines(folder)]
    assert {(row["spec"], row["id"]) for row in rows} == {
        (spec, f"{task}-000{number}") for spec in SPECS for task in ("read", "count") for number in (0, 1)
    }
    assert len(rows) == 16
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary.to_dict()))
    assert Image.open(folder / "accuracy_vs_kept.png").format == "PNG"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [policy["spec"] for policy in manifest["run"]["policies"]] == list(SPECS)
    assert manifest["run"]["context"]["versions"]["torch"] == torch.__version__
    assert manifest["run"]["context"]["model_digest"].startswith("sha256:")


def test_summary_counts_what_was_measured(finished: tuple[Path, Summary]) -> None:
    folder, summary = finished
    assert [row.spec for row in summary.rows] == list(SPECS)
    full, trim, norm, lossless = summary.rows
    assert full.kept_fraction == lossless.kept_fraction == 1.0
    assert full.bytes_held == full.bytes_full > trim.bytes_held
    assert 0.25 <= trim.kept_fraction < 0.27
    assert trim.kept_fraction == norm.kept_fraction
    assert full.agreement.hits == lossless.agreement.hits == summary.examples == 4
    rights = {one.id: one.answers for one in read_examples(folder / "data" / "data.jsonl")}
    by_hand = [json.loads(line) for line in lines(folder)]
    hits = sum(row["spec"] == "full" and row["answer"].lower() in rights[row["id"]] for row in by_hand)
    assert full.accuracy.hits == hits
    assert summary.repetitions == 2
    assert all(row.speed is not None and row.speed.prefill_ms > 0 for row in summary.rows)
    assert full.speed is not None
    assert full.speed.prefill_ratio.median == 1.0


def test_same_command_again_generates_nothing(
    finished: tuple[Path, Summary], tmp_path: Path, no_model: None
) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    seen: list[Progress] = []
    again = run(folder, seen.append, repetitions=2)
    assert again == finished[1]
    assert (folder / "summary.json").read_bytes() == (finished[0] / "summary.json").read_bytes()
    assert [(one.phase, one.done == one.total) for one in seen] == [("nothing left to do", True)]


def test_interrupted_run_resumes_to_the_same_results(finished: tuple[Path, Summary], tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", interrupt)
    kept = lines(tmp_path / "out")
    assert len(kept) == 9, "three configurations of the first batch of three"
    seen: list[Progress] = []
    run(tmp_path / "out", seen.append)
    assert (seen[0].done, seen[-1].done, seen[-1].total) == (3, 8, 8)
    assert set(kept) < set(lines(tmp_path / "out"))
    assert lines(tmp_path / "out") == lines(finished[0])


@pytest.mark.parametrize("share", [0.05, 0.3, 0.97])
def test_truncated_results_are_completed(
    finished: tuple[Path, Summary], tmp_path: Path, share: float
) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    whole = (folder / "results.jsonl").read_bytes()
    (folder / "results.jsonl").write_bytes(whole[: int(share * len(whole))])
    (folder / "timings.jsonl").write_bytes((folder / "timings.jsonl").read_bytes()[:-9])
    again = run(folder, repetitions=1)
    assert lines(folder) == lines(finished[0])
    assert [row.accuracy for row in again.rows] == [row.accuracy for row in finished[1].rows]


@pytest.fixture
def grown(finished: tuple[Path, Summary], tmp_path: Path) -> Path:
    """A copy of the finished folder to add to."""
    return shutil.copytree(finished[0], tmp_path / "grown")


def about_the_folder(notes: list[str]) -> list[str]:
    """Leave out what is said of any run: what its number of questions can show, and how the encoder ran."""
    return [note for note in notes if not note.startswith(("With ", "The encoder ran "))]


def add(folder: Path, policies: Sequence[str] = POLICIES, **changes: Any) -> tuple[Summary, list[str], int]:
    """Add to a folder; return the summary, the notes, and how many lines are new. No line ever goes."""
    before, notes = lines(folder) if folder.exists() else [], list[str]()
    found = compare(policies, RATIOS, settings(folder, **changes), on_note=notes.append)
    notes = about_the_folder(notes)
    after = lines(folder)
    assert not set(before) - set(after)
    return found, notes, len(after) - len(before)


def old_lines(count: int, reason: str) -> str:
    return f"{count} answers of former runs are kept in this folder, marked as old, and not shown: {reason}"


def test_a_policy_joins_and_only_it_is_computed(grown: Path, finished: tuple[Path, Summary]) -> None:
    found, notes, new = add(grown, ["random:reach=onward"])
    assert new == 4
    assert [row.spec for row in found.rows] == [*SPECS, "random:keep_ratio=0.25,reach=onward"]
    assert [row.accuracy for row in found.rows[:4]] == [row.accuracy for row in finished[1].rows]
    assert notes == ["this folder compares 5 configurations, 3 more than this command names"]


def test_questions_join_and_the_old_ones_stay_in_their_batches(grown: Path, tmp_path: Path) -> None:
    found, notes, new = add(grown, limit=3, batch_size=1)
    assert (found.examples, new, notes) == (6, 8, [])
    batches = json.loads((grown / "manifest.json").read_text())["run"]["batches"]
    assert batches == [
        ["read-0000", "read-0001", "count-0000"],
        ["count-0001"],
        ["read-0002"],
        ["count-0002"],
    ]
    fresh = run(tmp_path / "fresh", limit=3)
    assert [(row.spec, row.accuracy, row.agreement) for row in found.rows] == [
        (row.spec, row.accuracy, row.agreement) for row in fresh.rows
    ]


@pytest.mark.parametrize("changes", [{"tasks": ("read",)}, {"limit": 1}, {"batch_size": 1}, {"seed": 0}])
def test_what_is_there_is_not_computed_again(grown: Path, no_model: None, changes: dict[str, Any]) -> None:
    found, notes, new = add(grown, **changes)
    assert (found.examples, new) == (4, 0)
    fewer = "tasks" in changes or "limit" in changes
    assert notes == ["this folder asks 4 questions, 2 more than this command; all of them are shown"] * fewer


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_new_tokens": 2}, "max_new_tokens was 3 and is now 2"),
        ({"attn_implementation": "eager"}, 'attn_implementation was null and is now "eager"'),
        ({"dtype": "float64"}, 'dtype was "auto" and is now "float64"'),
    ],
)
def test_other_ingredients_are_named_and_computed_anew_and_the_old_ones_found_again(
    grown: Path, finished: tuple[Path, Summary], changes: dict[str, Any], reason: str
) -> None:
    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    notes: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        compare(POLICIES, RATIOS, settings(grown, **changes), stop, notes.append)
    assert about_the_folder(notes) == [old_lines(16, reason)], "before anything is computed"
    assert not (grown / "summary.json").exists(), "no summary of what is not shown any more"
    _, notes, new = add(grown, **changes)
    assert (new, notes) == (16, [old_lines(16, reason)])
    back, notes, new = add(grown, repetitions=2)
    assert new == 0
    assert len(notes) == 1
    assert notes[0].startswith(old_lines(16, reason.partition(" was ")[0]))
    assert back == finished[1]


def test_an_edited_picture_is_named_and_its_batch_computed_anew(grown: Path) -> None:
    Image.new("RGB", (112, 112)).save(grown / "data" / "images" / "read-0000.png")
    found, notes, new = add(grown)
    assert new == 12, "four configurations, and the batch of three that it was in"
    assert notes == [
        "1 of 4 examples changed in the data: read-0000",
        old_lines(12, "a question of their batch has changed, or is gone from the data"),
    ]
    assert found.examples == 4


def test_another_seed_of_the_demo_asks_other_questions(grown: Path, finished: tuple[Path, Summary]) -> None:
    _, notes, new = add(grown, seed=5)
    assert new == 16
    assert notes[0] == "the demo's questions had seed 0 and now have seed 5"
    back, _, new = add(grown, repetitions=2)
    assert (back, new) == (finished[1], 0)


def test_only_what_was_never_timed_is_timed(grown: Path, finished: tuple[Path, Summary]) -> None:
    def timed(folder: Path) -> list[tuple[int, list[str], list[str]]]:
        rows = [json.loads(line) for line in (folder / "timings.jsonl").read_text().splitlines()]
        return [(row["repetition"], list(row["policies"]), row["examples"]) for row in rows]

    before = timed(grown)
    add(grown, ["random:reach=onward"], limit=3, repetitions=2)
    assert [(number, set(specs)) for number, specs, _ in timed(grown)] == [
        *((number, set(specs)) for number, specs, _ in before),
        (2, {"full", "random:keep_ratio=0.25,reach=onward"}),
        (3, {"full", "random:keep_ratio=0.25,reach=onward"}),
    ]
    assert len({tuple(ids) for _, _, ids in timed(grown)}) == 1, "always the same batch"
    found, _, _ = add(grown, repetitions=3)
    assert len(timed(grown)) == 5
    assert set(timed(grown)[4][1]) == {row.spec for row in found.rows}
    assert all(row.speed is not None for row in found.rows)


def test_a_policy_that_was_asked_for_but_never_answered_is_forgotten(grown: Path) -> None:
    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(["norm:keep_ratio=0.75"], (), settings(grown, limit=9), stop)
    assert len(json.loads((grown / "manifest.json").read_text())["run"]["policies"]) == 5
    found, notes, new = add(grown)
    assert (len(found.rows), found.examples, notes, new) == (4, 4, [], 0)


def test_a_policy_that_is_gone_is_named(
    grown: Path, finished: tuple[Path, Summary], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = grid.exactly

    def lossless_is_gone(specs: Sequence[str]) -> tuple[grid.Configuration, ...]:
        if "lossless" in specs:
            raise UnknownPolicyError("no policy is called 'lossless'")
        return real(specs)

    monkeypatch.setattr(grid, "exactly", lossless_is_gone)
    found, notes, new = add(grown, POLICIES[:2])
    assert [row.spec for row in found.rows] == list(SPECS[:3])
    assert new == 0
    assert notes == [
        "lossless is in this folder but does not run any more (no policy is called 'lossless')",
        old_lines(4, "lossless is no longer part of this folder's comparison"),
    ]
    back, _, new = add(grown, repetitions=2)
    assert new == 0
    assert back == finished[1]


def test_the_reference_that_reads_the_answer_joins_at_each_ratio_and_is_not_timed(grown: Path) -> None:
    found, notes, new = add(grown, ["trim:keep_ratio=0.1"], answer_attention=True, repetitions=1)
    assert [row.spec for row in found.rows] == [
        *SPECS,
        "trim:keep_ratio=0.1",
        "answer-attention:keep_ratio=0.25",
        "answer-attention:keep_ratio=0.1",
    ]
    assert new == 12
    assert [row.speed is None for row in found.rows] == [False] * 5 + [True] * 2
    assert notes == ["this folder compares 7 configurations, 3 more than this command names"]
    again, _, new = add(grown, repetitions=1)
    assert (again, new) == (found, 0), "it stays, last in each budget"


def test_each_draw_is_computed_once(tmp_path: Path) -> None:
    policies = ("random:reach=onward", "trim")
    folder = tmp_path / "out"
    assert add(folder, policies)[2] == 12
    assert add(folder, policies, draws=3)[2] == 8, "two more seeds of random, and nothing of trim"
    assert add(folder, policies, draws=2)[2] == 0
    seeds = {(row["spec"], row["seed"]) for row in map(json.loads, lines(folder))}
    assert seeds == {
        ("full", None),
        ("trim:keep_ratio=0.25", None),
        *(("random:keep_ratio=0.25,reach=onward", seed) for seed in range(3)),
    }


def test_the_partner_is_checked_before_anything_is_written(tmp_path: Path, no_model: None) -> None:
    with pytest.raises(
        PolicyOptionError, match=r"there is no 'nrom' to compare with; .*choose one of: full, trim"
    ):
        run(tmp_path / "out", against="nrom")
    assert not list((tmp_path / "out").glob("*"))


def test_own_data_run_like_the_demo(finished: tuple[Path, Summary], tmp_path: Path) -> None:
    data = finished[0] / "data" / "data.jsonl"
    own = compare((), (), settings(tmp_path / "out", data=data, limit=2))
    assert [row.spec for row in own.rows] == ["full"]
    assert own.rows[0].accuracy == finished[1].rows[0].accuracy
    assert not (tmp_path / "out" / "data").exists()


def test_nothing_is_written_before_everything_is_checked(tmp_path: Path, no_model: None) -> None:
    bad = tmp_path / "data.jsonl"
    bad.write_text('{"image": "a.png"}\n')
    for error, match, changes in (
        (DataError, "line 1: field 'question' is missing", {"data": bad}),
        (DataError, "unknown task 'raed'; did you mean 'read'", {"tasks": ("raed",)}),
    ):
        with pytest.raises(error, match=match):
            run(tmp_path / "out", **changes)
    with pytest.raises(UnknownPolicyError, match="'trimm'"):
        compare(("trimm",), RATIOS, settings(tmp_path / "out"))
    with pytest.raises(PolicyOptionError, match="keep ratio 2 is not"):
        compare(POLICIES, (2,), settings(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*")), "no file is written"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"repetitions": -1}, "repetitions is -1"),
        ({"limit": 0}, "limit is 0"),
        ({"dtype": "float99"}, "unknown dtype 'float99'; choose from auto, float32"),
    ],
)
def test_impossible_settings_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(KVPruneError, match=message):
        settings(tmp_path, **changes)


def test_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    model = str(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=r"cannot load model '.*model' on 'cpu'"):
        run(tmp_path / "out", model=model)
    assert run(tmp_path / "out").examples == 4, "a folder without any answer is free for the right command"


def test_policy_that_reports_nothing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tell_nothing(self: Any, *_: Any, **__: Any) -> None:
        self.prefills += 1

    monkeypatch.setattr(kvprune.CompressionReport, "add_prefill", tell_nothing)
    with pytest.raises(ResultsError, match=r"full reports kept fractions \(\) for 3 examples"):
        run(tmp_path / "out")


def test_batches_are_padded_on_the_left(finished: tuple[Path, Summary]) -> None:
    generator = PictureGenerator.load(
        None, device="cpu", dtype="auto", attn_implementation=None, max_new_tokens=3
    )
    examples = read_examples(finished[0] / "data" / "data.jsonl")
    inputs = generator.encode(examples)
    mask = inputs["attention_mask"]
    assert not mask.all(), "questions of different length are padded"
    assert mask[:, -1].all()
    together = generator.texts(generator.generate(inputs))
    alone = [generator.texts(generator.generate(generator.encode([one])))[0] for one in examples]
    assert together == alone


def test_missing_package_is_named_before_work_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r'matplotlib, .*pip install "kvprune\[demo\]"'):
        run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("limit", [2, 3])
def test_questions_of_another_version_of_the_demo_are_not_mixed_with_those_of_now(
    finished: tuple[Path, Summary], tmp_path: Path, no_model: None, limit: int
) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "old")
    table = folder / "data" / "data.jsonl"
    rows = [json.loads(line) for line in table.read_text("utf-8").splitlines()]
    rows[0]["question"] = "which digit is purple?"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(
        ResultsError, match=r"read-0000 asks 'which digit is purple\?'.* give another --output"
    ):
        run(folder, limit=limit)
    assert not (folder / "data" / "images" / "read-0002.png").exists()
