"""A file that is killed at any byte loses nothing that was finished, and a damaged one is refused."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from comparison_helpers import answer, build_grid, example
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprune.comparison.plan.grid import expand
from kvprune.comparison.storage.answer_lines import answer_rows, current
from kvprune.comparison.storage.answers import Answer
from kvprune.comparison.storage.journal import Journal, write_json
from kvprune.comparison.storage.results_folder import ResultsFolder
from kvprune.errors import ResultsError

TRIM = "trim:keep_ratio=0.5"
EXAMPLES = [example(number) for number in range(6)]
ANSWERS = [answer(spec, asked, 'ä\u2028\x85 7\n"') for asked in EXAMPLES for spec in ("full", TRIM)]
GRID = build_grid(expand([TRIM], []), EXAMPLES, batch_size=6)


def rows(answers: list[Answer]) -> list[dict[str, Any]]:
    addresses, (batch,) = GRID.addresses(), GRID.batches
    return [row for one in answers for row in answer_rows(addresses.of(one.spec, batch, None), [one])]


def fill(folder: Path) -> Path:
    results = Journal(folder / "results.jsonl")
    for start in range(0, len(ANSWERS), 4):
        results.append(rows(ANSWERS[start : start + 4]))
    return results.path


def read(folder: Path) -> list[Answer]:
    opened = ResultsFolder.__new__(ResultsFolder)
    opened.path, opened.results = folder, Journal(folder / "results.jsonl")
    found, old = current("results.jsonl", opened.answers(), GRID, ())
    assert not old
    return list(found.values())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_cut_at_any_byte_keeps_every_finished_line(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = fill(folder)
        whole = path.read_bytes()
        cut = data.draw(st.integers(0, len(whole)), label="bytes left")
        path.write_bytes(whole[:cut])
        finished = whole[:cut].count(b"\n")
        assert read(folder) == ANSWERS[:finished]
        assert path.read_bytes() == whole[: whole.rfind(b"\n", 0, cut) + 1], "the unfinished line is cut off"
        Journal(path).append(rows(ANSWERS[finished:]))
        assert path.read_bytes() == whole
        assert read(folder) == ANSWERS


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_damage_in_the_middle_is_named_and_changes_nothing(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = fill(folder)
        lines = path.read_bytes().splitlines(keepends=True)
        number = data.draw(st.integers(0, len(lines) - 1), label="damaged line")
        cut = data.draw(st.integers(0, len(lines[number]) - 2), label="bytes of it left")
        lines[number] = lines[number][:cut] + b"\n"
        damaged = b"".join(lines) + b'{"unfinished'
        path.write_bytes(damaged)
        with pytest.raises(ResultsError, match=f"results.jsonl, line {number + 1} is damaged"):
            read(folder)
        assert path.read_bytes() == damaged


def test_line_of_zero_bytes_is_damage(tmp_path: Path) -> None:
    path = fill(tmp_path)
    path.write_bytes(path.read_bytes() + b"\0" * 40 + b"\n")
    with pytest.raises(ResultsError, match=f"line {len(ANSWERS) + 1} is damaged"):
        read(tmp_path)


def test_json_files_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    before = path.read_text()
    with pytest.raises(ValueError, match="nan"):
        write_json(path, {"a": float("nan")})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"a": 2})
    assert path.read_text() == before
    assert [one.name for one in tmp_path.iterdir()] == ["summary.json"], "no temporary file is left"
