"""A results folder of speech grows and is verified like one of pictures; each count is checked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from speech_helpers import speech_file, tiny_checkpoint

from kvprune.comparison import Settings, compare, describe_folder, read_run, verify
from kvprune.comparison.execution.claim import find_data
from kvprune.comparison.storage.answers import Transcript
from kvprune.comparison.storage.sources import data_file, model_of, speech_data
from kvprune.errors import ResultsError

POLICIES, RATIOS = ("trim", "random:reach=onward"), (0.5,)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speech-folder")
    tiny_checkpoint(folder / "model")
    speech_file(folder, ("en", "german", "en"))
    return folder


def settings(root: Path, output: Path, **changes: Any) -> Settings:
    data = next(root.glob("*.jsonl"))
    own = {"model": str(root / "model"), "data": data, "batch_size": 2, "repetitions": 0, "device": "cpu"}
    return Settings(output=output, answer_attention=False, **{**own, **changes})


@pytest.fixture(scope="module")
def finished(root: Path) -> Path:
    compare(POLICIES, RATIOS, settings(root, root / "results", draws=2))
    return root / "results"


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "results")


def test_batches_have_one_language_and_answers_are_transcripts(finished: Path) -> None:
    stored = read_run(finished)
    languages = {one.id: one.language for one in stored.examples}  # type: ignore[attr-defined]
    assert [{languages[name] for name in batch} for batch in stored.batches] == [{"en"}, {"de"}]
    assert all(isinstance(one, Transcript) for one in stored.answers.values())
    assert len(stored.answers) == 3 * (2 + 2), "full, trim, and random with two seeds"
    described = describe_folder(finished)
    assert (described.kind, described.answers, described.missing) == ("speech", 12, 0)


def test_a_folder_of_speech_reproduces_and_grows(root: Path, folder: Path) -> None:
    found = verify(folder, sample=None)
    assert found.reproduces, str(found)
    assert (found.lines, found.answers, found.calls) == (12, 12, 8)
    before = (folder / "results.jsonl").read_text()
    compare(["norm:reach=onward"], RATIOS, settings(root, folder))
    after = (folder / "results.jsonl").read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == 15


def test_each_changed_count_is_named(folder: Path) -> None:
    """Each is changed in a line of its own, so that one verification finds all of them."""
    fields = "word_errors", "words", "character_errors", "characters", "tokens", "cap", "loops", "correct"
    path = folder / "results.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row, field in zip(rows[-len(fields) :], fields, strict=True):
        row[field] = not row[field] if isinstance(row[field], bool) else row[field] + 1
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = verify(folder, sample=None)
    for row, field in zip(rows[-len(fields) :], fields, strict=True):
        assert any(
            (one.spec, one.example) == (row["spec"], row["id"]) and one.what.startswith(f"{field} was ")
            for one in found.differences
        ), f"{field}: {found}"


def test_an_answer_to_a_question_is_no_transcript(folder: Path) -> None:
    path = folder / "results.jsonl"
    *lines, last = path.read_text().splitlines()
    row = json.loads(last)
    for name in ("word_errors", "words", "character_errors", "characters", "tokens", "cap", "loops"):
        del row[name]
    path.write_text("".join(line + "\n" for line in (*lines, json.dumps(row))))
    with pytest.raises(ResultsError, match="line 12 is damaged: it is of the kind Answer, not Transcript"):
        verify(folder)


def test_the_demo_of_speech_is_read_where_it_is(finished: Path) -> None:
    given = Settings(demo="speech")
    data = find_data(given)
    assert (data.origin, data.kind) == ("speech", "speech")
    assert data.examples is not None
    assert {one.file.parent for one in data.examples} == {speech_data().parent}
    assert model_of(given, data.kind) == "openai/whisper-base"
    assert model_of(Settings(), "pictures") is None
    assert data_file(finished, read_run(finished).grid, Path("own.jsonl")) == Path("own.jsonl")
