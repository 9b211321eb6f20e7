"""Every way a data file can be wrong is named, with the line and what would be right."""

from __future__ import annotations

import io
import os
import random
import re
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from comparison_helpers import row
from PIL import Image

from kvprune.comparison.data.examples import (
    Example,
    Question,
    choose,
    digest,
    is_correct,
    normalise,
    read_examples,
)
from kvprune.errors import DataError

Write = Callable[[list[Any]], Path]


def test_reads_rows_in_order_with_defaults(write_rows: Write) -> None:
    examples = read_examples(write_rows([row(id="a", task="colour"), "", row(id=5), row()]))
    assert [(one.id, one.task) for one in examples] == [("a", "colour"), ("5", "all"), ("row-4", "all")]
    assert examples[0].file.name == "good.png"
    assert examples[0].answers == ("red",)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{not json", r"line 2: not JSON .*double quotes.*\"question\""),
        ("[1, 2]", r"line 2: a list where an object"),
        ('"text"', r"line 2: a string where an object"),
        ("null", r"line 2: a null where an object"),
        ("[" * 100_000, r"line 2: not JSON \(nested more than 50 levels deep\)"),
        ('{"image": "a", "image": "b"}', r"line 2: not JSON \(key 'image' appears twice in one object\)"),
        ('{"question": "\\ud800"}', r"line 2: not JSON .*surrogates not allowed"),
        ('{"weight": NaN}', r"line 2: not JSON \(NaN is not a JSON number\)"),
        (row(image=None), r"line 2: field 'image' is missing .*the row has: question, answers"),
        (row(question=None), r"line 2: field 'question' is missing"),
        (row(answers=None, answer="red"), r"line 2: field 'answers' is missing; is 'answer' meant\?"),
        (row(question=None, qestion="?"), r"'question' is missing; is 'qestion' meant\?"),
        (row(question=3), r"line 2: field 'question' is 3; it must be a non-empty string"),
        (row(question="  "), r"field 'question' is '  '"),
        (row(image=["good.png"]), r"line 2: field 'image' is \['good.png'\]"),
        (row(task=7), r"line 2: field 'task' is 7"),
        (row(answers="red"), r"line 2: field 'answers' is 'red'; it must be a list"),
        (row(answers=[]), r"line 2: field 'answers' is \[\]"),
        (row(answers=["red", 4]), r"line 2: field 'answers' holds 4"),
        (row(answers=[" "]), r"line 2: field 'answers' holds ' '"),
        (row(id=""), r"line 2: field 'id' is ''"),
        (row(id=True), r"line 2: field 'id' is True"),
        (row(id=1.5), r"line 2: field 'id' is 1.5"),
        (row(id="row-1"), r"line 2: id 'row-1' is already used in line 1"),
        (row(image="absent.png"), r"line 2: field 'image': no file at .*absent.png"),
        (row(image="data.jsonl"), r"line 2: field 'image': .*data.jsonl is not a readable picture"),
    ],
)
def test_bad_rows_are_named(write_rows: Write, bad: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_examples(write_rows([row(), bad]))


def test_cut_picture_is_refused_though_its_header_is_whole(write_rows: Write, tmp_path: Path) -> None:
    path = write_rows([row(image="cut.png")])
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) * 3 // 4])
    with Image.open(tmp_path / "cut.png") as opened:
        assert opened.size == (64, 64)
    with pytest.raises(DataError, match=r"line 1: field 'image': .*cut.png is not a readable picture"):
        read_examples(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data file at .*nowhere.jsonl"):
        read_examples(tmp_path / "nowhere.jsonl")


def test_folder_instead_of_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(f"cannot read data file {tmp_path}")):
        read_examples(tmp_path)


@pytest.mark.parametrize("rows", [[], ["", "  "]])
def test_file_without_rows_is_named(write_rows: Write, rows: list[str]) -> None:
    with pytest.raises(DataError, match=r"data.jsonl holds no rows"):
        read_examples(write_rows(rows))


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"image": "\xff"}\n')
    with pytest.raises(DataError, match=r"line 1: byte 12 is not UTF-8"):
        read_examples(path)


def test_choose_takes_the_first_of_each_task(write_rows: Write) -> None:
    rows = [row(id=name, task=name[0]) for name in ("a1", "b1", "a2", "b2", "a3")]
    examples = read_examples(write_rows(rows))
    assert [one.id for one in choose(examples, None, 1)] == ["a1", "b1"]
    assert [one.id for one in choose(examples, ["a"], 2)] == ["a1", "a2"]
    assert choose(examples, None, None) == examples


def test_unmatched_task_is_named(write_rows: Write) -> None:
    examples = read_examples(write_rows([row(task="read")]))
    with pytest.raises(DataError, match=r"unknown task 'raed'; did you mean 'read'\?; the data has: read"):
        choose(examples, ["raed"], None)
    with pytest.raises(DataError, match="limit is 0"):
        choose(examples, None, 0)
    with pytest.raises(DataError, match="no task chosen; the data has: read"):
        choose(examples, [], None)


@pytest.mark.parametrize("changes", [{"id": "b"}, {"question": "?"}, {"answers": ("blue",)}, {"task": "b"}])
def test_digest_sees_every_change(write_rows: Write, tmp_path: Path, changes: dict[str, Any]) -> None:
    before = digest(read_examples(write_rows([row(id="a", task="a")])))
    assert digest(read_examples(write_rows([row(id="a", task="a")]))) == before
    assert digest(read_examples(write_rows([row(id="a", task="a") | changes]))) != before


def test_digest_sees_other_pixels_but_no_other_place(write_rows: Write, tmp_path: Path) -> None:
    def one(sha: str, path: str) -> Example:
        found = read_examples(write_rows([row()]))[0]
        return Question(
            id=found.id,
            task=found.task,
            file=Path(path),
            question=found.question,
            answers=found.answers,
            file_sha256=sha,
        )

    assert digest([one("0", "a.png")]) == digest([one("0", "b.png")])
    assert digest([one("0", "a.png")]) != digest([one("1", "a.png")])


def test_answers_are_compared_normalised() -> None:
    assert normalise("  Straße \n 7 ") == "strasse 7"
    assert is_correct(" RED\n", ["blue", "red"])
    assert not is_correct("redder", ["red"])
    assert not is_correct("", ["red"])


def picture_error(write_rows: Write, tmp_path: Path, content: bytes) -> None:
    """Read a file of pictures; anything but success or a DataError fails the test."""
    path = write_rows([row(image="odd")])
    (tmp_path / "odd").write_bytes(content)
    with suppress(DataError):
        read_examples(path)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # of the TIFF decoder about what was damaged
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_damaged_pictures_are_data_errors(write_rows: Write, tmp_path: Path, kind: str) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((40, 30), 60).convert("RGB").save(buffer, kind)
    whole, draw = buffer.getvalue(), random.Random(kind)
    for _ in range(40):
        picture_error(write_rows, tmp_path, whole[: draw.randrange(len(whole))])
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[draw.randrange(min(len(whole), draw.choice((40, 10**6))))] = draw.randrange(256)
        picture_error(write_rows, tmp_path, bytes(damaged))


def test_pictures_that_unpack_to_gigabytes_are_refused(write_rows: Write, tmp_path: Path) -> None:
    size = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n"
    for name, content in ((b"IHDR", size), (b"IDAT", zlib.compress(bytes(10**6))), (b"IEND", b"")):
        crc = struct.pack(">I", zlib.crc32(name + content))
        bomb += struct.pack(">I", len(content)) + name + content + crc
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(DataError, match=r"line 1: field 'image': .*bomb.png .*3600000000 pixels.*bomb"):
        read_examples(write_rows([row(image="bomb.png")]))


def test_pictures_that_are_programs_are_refused(
    write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import EpsImagePlugin

    def run(*_: Any, **__: Any) -> None:
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    Image.new("RGB", (8, 8)).save(tmp_path / "program.png", "EPS")
    with pytest.raises(DataError, match=r"program.png is not a readable picture \(.*cannot identify"):
        read_examples(write_rows([row(image="program.png")]))


def test_pictures_in_odd_places_are_data_errors(write_rows: Write, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "good.png/x", "a\0b", "x" * 5000):
        with pytest.raises(DataError, match="line 1: field 'image': "):
            read_examples(write_rows([row(image=name)]))
