"""A folder that is as it was reproduces; whatever was changed is found and named; nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comparison_helpers import (
    SMALL_POLICIES,
    SMALL_RATIOS,
    SMALL_SPECS,
    contents,
    forge_context,
    small_settings,
)

from kvprune.comparison import Progress, Verification, compare, verify
from kvprune.comparison.execution.generation import Generator
from kvprune.errors import (
    DataError,
    KVPruneError,
    ResultsError,
    UnknownPolicyError,
    UnsupportedModelError,
)

FULL, TRIM, RANDOM, LOSSLESS = SMALL_SPECS


def edit_line(folder: Path, spec: str, name: str, **changes: Any) -> None:
    """Change fields of one line of results.jsonl."""
    path = folder / "results.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    (row,) = (row for row in rows if (row["spec"], row["id"]) == (spec, name))
    row.update(changes)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value, indent=2))


def verify_unchanged(folder: Path, **options: Any) -> Verification:
    """Verify everything, and check that the folder stays as it was."""
    before = contents(folder)
    found = verify(folder, **{"sample": None, **options})
    assert contents(folder) == before
    return found


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing run again, for tests of what is found without a model."""
    monkeypatch.setattr("kvprune.comparison.verification.verification._run_again", lambda *_: ([], []))


def test_an_untouched_folder_reproduces(folder: Path) -> None:
    seen: list[Progress] = []
    found = verify_unchanged(folder, on_progress=seen.append)
    assert found.reproduces
    assert (found.lines, found.answers, found.same_answers, found.same_receipts) == (16, 16, 16, 16)
    assert found.calls == 8, "two batches, four configurations"
    assert found.differences == found.notes == ()
    assert str(found).startswith("reproduces: 16 of 16 answers, 16 of 16 receipts")
    assert (seen[0].done, seen[-1].done, seen[-1].total) == (0, 8, 8)
    assert json.loads(json.dumps(found.to_dict()))["reproduces"] is True


def test_a_sample_is_drawn_by_the_seed_and_meets_each_configuration(folder: Path) -> None:
    found = verify_unchanged(folder, sample=3, seed=4)
    assert found == verify(folder, sample=3, seed=4)
    assert found.reproduces
    assert 4 <= found.calls <= 5, "three configurations, and the full cache of one or two batches"
    assert 4 <= found.answers < 16
    assert len({verify(folder, sample=1, seed=seed).answers for seed in range(6)}) == 2, (
        "a batch of 3, or of 1"
    )


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("answer", "99", 'answer was "99" and is now "'),
        ("receipt", "0" * 64, f'receipt was "{"0" * 64}" and is now "'),
        ("kept_fraction", 0.2501, "kept_fraction was 0.2501 and is now 0.2"),
        ("bytes_held", 17, "bytes_held was 17 and is now "),
        ("finished", None, "finished was "),
    ],
)
def test_a_changed_result_is_named(folder: Path, field: str, value: Any, named: str) -> None:
    if value is None:
        rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
        value = not next(row["finished"] for row in rows if (row["spec"], row["id"]) == (TRIM, "read-0001"))
    edit_line(folder, TRIM, "read-0001", **{field: value})
    found = verify_unchanged(folder)
    assert not found.reproduces
    (one,) = (one for one in found.differences if one.example == "read-0001" and named in one.what)
    assert (one.spec, one.where) == (TRIM, f"{TRIM}, example read-0001")
    assert {one.example for one in found.differences} <= {"read-0001", None}
    assert "does not reproduce: " in str(found)
    assert f"  {TRIM}, example read-0001: " in str(found)
    assert found.same_answers == 16 - (field == "answer")
    assert found.same_receipts == 16 - (field == "receipt")


@pytest.mark.parametrize("field", ["correct", "agrees_with_full"])
def test_a_changed_judgement_is_named_without_a_model(folder: Path, no_model: None, field: str) -> None:
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    was = next(row[field] for row in rows if (row["spec"], row["id"]) == (LOSSLESS, "count-0000"))
    edit_line(folder, LOSSLESS, "count-0000", **{field: not was})
    found = verify_unchanged(folder)
    first = found.differences[0]
    assert (first.spec, first.example) == (LOSSLESS, "count-0000")
    assert first.what == f"{field} was {json.dumps(not was)} and is now {json.dumps(was)}"
    assert any(one.where == "summary.json" for one in found.differences)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s["rows"][1]["accuracy"].update(hits=99), "rows[1].accuracy.hits was 99"),
        (lambda s: s["rows"][1].update(kept_fraction=0.1), "rows[1].kept_fraction was 0.1"),
        (lambda s: s["rows"][2]["speed"].update(token_ms=0.001), "rows[2].speed.token_ms was 0.001"),
        (lambda s: s.update(repetitions=9), "repetitions was 9, but 1 were timed"),
        (lambda s: s.pop("device"), 'device was null and is now "cpu"'),
    ],
)
def test_a_changed_summary_is_named_without_a_model(
    folder: Path, no_model: None, change: Callable[[dict[str, Any]], None], named: str
) -> None:
    edit_json(folder / "summary.json", change)
    (found,) = verify_unchanged(folder).differences
    assert found.where == "summary.json"
    assert named in found.what


def test_an_edited_grid_is_named(folder: Path, no_model: None) -> None:
    edit_json(folder / "manifest.json", lambda m: m["run"]["policies"].pop())
    found = verify_unchanged(folder)
    assert found.differences[0].where == "manifest.json (its 'run' was edited)"
    assert found.notes == (
        "4 answers are not part of the present comparison, and were not verified: "
        "a question of their batch has changed, or is gone from the data",
    )
    edit_json(folder / "manifest.json", lambda m: m["run"]["context"].update(max_new_tokens=4))
    with pytest.raises(ResultsError, match="holds no finished answer yet"):
        verify(folder)


def test_each_draw_is_run_again_with_its_seed(folder: Path) -> None:
    compare(SMALL_POLICIES, SMALL_RATIOS, small_settings(folder, draws=3, repetitions=1))
    found = verify_unchanged(folder)
    assert found.reproduces
    assert found.calls == 2 * (3 + 3), "two batches; full, trim, lossless, and random with three seeds"
    assert found.lines == found.answers == 4 * (3 + 3)
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    drawn = [line for line in lines if line["seed"] == 2 and line["id"] == "read-0000"]
    assert len(drawn) == 1
    for line in lines:
        if line is drawn[0]:
            line["receipt"] = "0" * 64
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = verify_unchanged(folder)
    assert [one.what[:7] for one in found.differences] == ["receipt"]
    assert verify(folder, sample=5).calls >= 5 + 1, "seeds take turns, as configurations do"


def test_old_answers_are_a_note(folder: Path) -> None:
    compare(SMALL_POLICIES, SMALL_RATIOS, small_settings(folder, max_new_tokens=2, repetitions=0))
    found = verify_unchanged(folder)
    assert found.reproduces
    assert (found.lines, found.answers) == (16, 16)
    assert found.notes == (
        "16 answers are not part of the present comparison, and were not verified: "
        "max_new_tokens was 3 and is now 2",
    )


def test_changed_policies_versions_and_weights_are_notes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, no_model: None
) -> None:
    monkeypatch.setattr("kvprune.comparison.storage.identity._source_digest", lambda _: "edited")
    monkeypatch.setattr("kvprune.comparison.storage.manifest.code_digest", lambda: "edited, too")
    monkeypatch.setattr("kvprune.comparison.storage.manifest.model_digest", lambda *_: "sha256:other")
    edit_json(folder / "manifest.json", lambda m: m["about"].update(python="2.7"))
    found = verify_unchanged(folder)
    assert found.reproduces, "what is not run again is still as it was"
    text = "\n".join(found.notes)
    assert f"changed since: policies.{TRIM}.source_sha256 was " in text
    assert 'kvprune_source_sha256 was "' in text
    assert 'and is now "sha256:other"' in text
    assert 'python was "2.7" and is now' in text
    assert f"note: changed since: policies.{TRIM}" in str(found)


def test_changed_pictures_are_a_note_and_what_they_change_a_difference(folder: Path) -> None:
    images = folder / "data" / "images"
    shutil.copy(images / "count-0001.png", images / "read-0000.png")
    found = verify_unchanged(folder)
    assert any("changed since: examples.read-0000 was" in note for note in found.notes)
    assert not found.reproduces
    assert {one.example for one in found.differences} == {"read-0000"}


def test_unfinished_comparisons_are_verified_as_far_as_they_are(folder: Path) -> None:
    whole = (folder / "results.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (folder / "results.jsonl").write_bytes(b"".join(lines[:7]) + lines[7][:30])
    found = verify_unchanged(folder)
    (one,) = found.differences
    assert one.what == "9 of 16 answers are missing, but there is a summary.json"
    (folder / "summary.json").unlink()
    found = verify_unchanged(folder)
    assert found.reproduces
    assert found.lines == found.answers == 7
    assert "results.jsonl ends in an unfinished line, which the next compare computes again" in found.notes
    assert "the comparison is unfinished: 9 of 16 answers are missing" in found.notes


def test_own_data_and_model_are_found_from_anywhere(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvprune import demo

    shutil.copytree(demo.model_path(), tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    own = {"data": Path("results/data/data.jsonl"), "model": "model", "limit": 1, "repetitions": 0}
    compare((), (), small_settings(tmp_path / "own", **own))
    monkeypatch.chdir("/")
    found = verify_unchanged(tmp_path / "own")
    assert found.reproduces
    assert not found.notes
    shutil.rmtree(folder)
    with pytest.raises(DataError, match=r"no data file at .*results/data/data.jsonl"):
        verify(tmp_path / "own")


def test_a_missing_model_is_named(folder: Path) -> None:
    edit_json(folder / "manifest.json", lambda manifest: manifest["about"].update(model="/no/such/model"))
    with pytest.raises(UnsupportedModelError, match="cannot find model '/no/such/model'"):
        verify(folder)


def test_what_a_folder_says_about_trust_is_not_followed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forge_context(folder, trust_remote_code=True)
    seen: list[bool] = []

    def load(*_: Any, trust_remote_code: bool, **__: Any) -> None:
        seen.append(trust_remote_code)
        raise UnsupportedModelError("far enough")

    monkeypatch.setattr(Generator, "load", load)
    for given in (False, True):
        with pytest.raises(UnsupportedModelError, match="far enough"):
            verify(folder, trust_remote_code=given)
    assert seen == [False, True]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda m: m["run"].update(seeds=["0"]),
            ResultsError,
            r"manifest.json is damaged: run.seeds is \['0'\]",
        ),
        (lambda m: m["run"].update(seeds=[1, 0]), ResultsError, r"run.seeds is \[1, 0\]"),
        (lambda m: m["run"]["context"].update(max_new_tokens=True), ResultsError, "max_new_tokens is True"),
        (lambda m: m["run"]["context"].pop("dtype"), ResultsError, "run.context.dtype is None"),
        (lambda m: m["run"].update(context=3), ResultsError, "run.context is 3"),
        (lambda m: m["run"].update(examples=[1]), ResultsError, r"run.examples is \[1\]"),
        (lambda m: m["run"].update(batches=[[]]), ResultsError, r"run.batches is \[\[\]\]"),
        (lambda m: m["run"]["batches"].pop(), ResultsError, "run.batches does not hold each of run.examples"),
        (lambda m: m["run"].update(data={"origin": "web"}), ResultsError, "run.data is {'origin': 'web'}"),
        (lambda m: m["run"]["data"].update(seed="x"), ResultsError, "run.data.seed is 'x'"),
        (lambda m: m["run"].update(policies=[]), ResultsError, "run.policies is"),
        (lambda m: m["run"]["policies"][1].update(spec="gone"), UnknownPolicyError, "'gone'"),
        (lambda m: m.update(earlier=[3]), ResultsError, r"earlier\[0\] is 3"),
        (lambda m: m.pop("about"), ResultsError, "about is None"),
        (lambda m: m["about"].pop("model"), ResultsError, "about.model is None"),
        (lambda m: m.update(format=1), ResultsError, "format 1 has no receipts"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_named(
    folder: Path, change: Callable[[dict[str, Any]], None], error: type[KVPruneError], message: str
) -> None:
    edit_json(folder / "manifest.json", change)
    before = contents(folder)
    with pytest.raises(error, match=message):
        verify(folder)
    assert contents(folder) == before


def test_what_holds_no_results_is_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ResultsError, match=r"there are no results at .*nowhere"):
        verify(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    (folder / "results.jsonl").write_bytes(b"")
    with pytest.raises(ResultsError, match="holds no finished answer yet"):
        verify(folder)
    with pytest.raises(KVPruneError, match="sample is 0; it must be at least 1"):
        verify(folder, sample=0)
