"""A results folder takes its own run back, and refuses everything else by name, unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from comparison_helpers import answer, example

from kvprune.comparison.plan.grid import Configuration
from kvprune.comparison.storage.answers import to_row
from kvprune.comparison.storage.manifest import build_manifest, model_digest, refusal
from kvprune.comparison.storage.results_folder import ResultsFolder
from kvprune.comparison.storage.timings import read_laps
from kvprune.errors import ResultsError


def manifest(configurations: tuple[Configuration, ...], **settings: Any) -> dict[str, Any]:
    return build_manifest(configurations, {"seed": 0, "limit": 4, "tasks": ("a", "b"), **settings}, {})


def used(path: Path, configurations: tuple[Configuration, ...]) -> Path:
    """A folder with one finished answer."""
    with ResultsFolder(path) as folder:
        folder.claim(manifest(configurations))
        folder.results.append([to_row(answer("full", example(0), "7"))])
    return path


def test_own_run_is_taken_back(tmp_path: Path, configurations: tuple[Configuration, ...]) -> None:
    path = used(tmp_path / "new" / "folder", configurations)
    before = (path / "manifest.json").read_bytes()
    with ResultsFolder(path) as folder:
        folder.claim(manifest(configurations))
        assert list(folder.answers(["full"], ["e0"])) == [("full", "e0")]
    assert (path / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 1}, "another run: seed was 0 and is now 1"),
        ({"limit": None}, "another run: limit was 4 and is now null"),
        ({"tasks": ["a"]}, r"another run: tasks had 2 entries and now has 1 \(first extra: \"b\"\)"),
        ({"tasks": ["a", "c"]}, r"another run: tasks\[1\] was \"b\" and is now \"c\""),
    ],
)
def test_other_settings_are_refused(
    tmp_path: Path, configurations: tuple[Configuration, ...], settings: dict[str, Any], message: str
) -> None:
    path = used(tmp_path, configurations)
    before = {one.name: one.read_bytes() for one in path.iterdir()}
    with ResultsFolder(path) as folder, pytest.raises(ResultsError, match=message + r".*--output"):
        folder.claim(manifest(configurations, **settings))
    assert {one.name: one.read_bytes() for one in path.iterdir()} == before


def test_other_policies_are_refused(tmp_path: Path, configurations: tuple[Configuration, ...]) -> None:
    with (
        ResultsFolder(used(tmp_path, configurations)) as folder,
        pytest.raises(ResultsError, match=r"policies had 6 entries and now has 5 .*trim:keep_ratio=0.1"),
    ):
        folder.claim(manifest(configurations[:-1]))


def test_edited_policy_is_refused(
    tmp_path: Path, configurations: tuple[Configuration, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = used(tmp_path / "out", configurations)
    edited = tmp_path / "edited.py"
    edited.write_text("# one more line\n")
    monkeypatch.setattr("inspect.getsourcefile", lambda _: str(edited))
    with (
        ResultsFolder(path) as folder,
        pytest.raises(ResultsError, match=r"another run: policies\[0\].source_sha256 was"),
    ):
        folder.claim(manifest(configurations))


def test_folder_without_any_answer_is_free(tmp_path: Path, configurations: tuple[Configuration, ...]) -> None:
    with ResultsFolder(tmp_path) as folder:
        folder.claim(manifest(configurations))
    with ResultsFolder(tmp_path) as folder:
        folder.claim(manifest(configurations, seed=3))
    assert json.loads((tmp_path / "manifest.json").read_text())["run"]["seed"] == 3


def test_changed_data_are_refused(tmp_path: Path, configurations: tuple[Configuration, ...]) -> None:
    with ResultsFolder(tmp_path) as folder:
        folder.claim(manifest(configurations))
        folder.pin("data_sha256", "abc")
        folder.pin("data_sha256", "abc")
    with ResultsFolder(tmp_path) as folder:
        folder.claim(manifest(configurations))
        with pytest.raises(ResultsError, match="data_sha256 was 'abc' and is now 'def'"):
            folder.pin("data_sha256", "def")


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(
        ResultsError, match=r"is not a results folder: it holds 'thesis.tex' but no manifest.json"
    ):
        ResultsFolder(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(ResultsError, match="file is a file; --output must name a folder"):
        ResultsFolder(path)


def test_leftovers_of_a_killed_start_are_no_obstacle(
    tmp_path: Path, configurations: tuple[Configuration, ...]
) -> None:
    (tmp_path / ".kvprune-x1y2").write_text('{"kind": "kvpru')
    with ResultsFolder(tmp_path) as folder:
        folder.claim(manifest(configurations))
    assert (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "manifest.json is damaged"),
        (b'{"kind": "kvprune comp', "manifest.json is damaged .*Unterminated"),
        (b"\xff\xfe", "manifest.json is damaged .*utf-8"),
        (b"[]", "is not the manifest of a kvprune comparison"),
        (b'{"kind": "grocery list"}', "is not the manifest of a kvprune comparison"),
        (b'{"kind": "kvprune comparison", "format": 99}', "has format 99, but this kvprune reads 3"),
        (b'{"kind": "kvprune comparison", "format": 1}', "reads 3, since format 1 has no receipts"),
        (
            b'{"kind": "kvprune comparison", "format": 2}',
            "reads 3, since format 2 does not say how many tokens",
        ),
        (b'{"kind": "kvprune comparison", "format": 3, "run": {"pinned": 3}}', "field 'run.pinned' is 3"),
        (b'{"kind": "kvprune comparison", "format": 3, "run": 3}', "damaged: field 'run' is 3"),
    ],
)
def test_damaged_manifest_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ResultsError, match=message):
        ResultsFolder(tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": "norm"}, "line 2: spec 'norm' with example 'e1' is not part of this run"),
        ({"id": "e9"}, "line 2: spec 'full' with example 'e9' is not part of this run"),
        ({"id": "e0"}, "line 2: spec 'full' with example 'e0' appears twice"),
        ({"correct": 1}, "line 2 is damaged: field 'correct' is 1, not a bool"),
        ({"bytes_held": True}, "line 2 is damaged: field 'bytes_held' is True, not a int"),
        ({"answer": None}, "line 2 is damaged: field 'answer' is None"),
        ({"extra": 1}, "line 2 is damaged: field 'extra' is unknown"),
        ({"kept_fraction": 1.5}, "field 'kept_fraction' is 1.5, not between 0 and 1"),
        ({"bytes_held": -1}, "field 'bytes_held' is -1, not a number of bytes"),
        ({"bytes_full": 10**400}, "field 'bytes_full' is 1000.*, not a number of bytes"),
        ({"receipt": "A" * 64}, "field 'receipt' is 'AAA.*, not 64 hexadecimal digits"),
    ],
)
def test_lines_that_do_not_belong_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = ResultsFolder(tmp_path)
    second = to_row(answer("full", example(1), "7")) | change
    folder.results.append([to_row(answer("full", example(0), "7")), second])
    with pytest.raises(ResultsError, match=message):
        folder.answers(["full"], ["e0", "e1"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stock": [0, 1]}, r"\[0, 1\] is not a pair of seconds"),
        ({"stock": [1, 1e10]}, "is not a pair of seconds"),
        ({"stock": [1, 2, 3]}, "is not a pair of seconds"),
        ({"policies": {"full": ["1", "2"]}}, "is not a pair of seconds"),
        ({"policies": {}}, "it times other configurations"),
        ({"policies": 3}, "not iterable"),
        ({"repetition": 0}, "repetition is 0"),
        ({"repetition": True}, "repetition is True"),
    ],
)
def test_timings_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    first = {"repetition": 0, "stock": [1, 2.5], "policies": {"full": [1.5, 3]}}
    assert read_laps("timings.jsonl", [first], ["full"])[0]["full"].all == 3
    with pytest.raises(ResultsError, match=rf"timings.jsonl, line 2 is damaged \(.*{message}"):
        read_laps("timings.jsonl", [first, {**first, "repetition": 1, **change}], ["full"])


def test_line_without_a_field_is_refused(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path)
    row = to_row(answer("full", example(1), "7"))
    del row["kept_fraction"]
    folder.results.append([row])
    with pytest.raises(ResultsError, match="line 1 is damaged: field 'kept_fraction' is missing"):
        folder.answers(["full"], ["e1"])


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    second = ResultsFolder(tmp_path)
    with ResultsFolder(tmp_path), pytest.raises(ResultsError, match="is in use by another run"):
        second.__enter__()
    with ResultsFolder(tmp_path):
        pass


def test_the_first_difference_is_named_by_its_path() -> None:
    assert refusal({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}) is None
    assert refusal({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == "a[1].b was 2 and is now 3"
    assert refusal({"a": 1}, {"a": 1, "c": 2}) == "c was null and is now 2"
    assert refusal({"a": True}, {"a": 1}) == "a was true and is now 1"


def test_model_digest_follows_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "README.md").write_text("first")
    before = model_digest(str(tmp_path))
    (tmp_path / "README.md").write_text("second")
    assert model_digest(str(tmp_path)) == before
    (tmp_path / "model.safetensors").write_bytes(b"weightz")
    assert model_digest(str(tmp_path)) != before
