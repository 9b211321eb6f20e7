"""Lines of results are read quickly, and exactly as the strict parser reads them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from comparison_helpers import answer, example
from hypothesis import example as always
from hypothesis import given, settings
from hypothesis import strategies as st
from large_results import write_large_folder

from kvprune.comparison import describe_folder
from kvprune.comparison.storage.answer_lines import LineReader, StoredAnswer, answer_rows, read_line
from kvprune.comparison.storage.answers import Answer, Transcript
from kvprune.errors import ResultsError

UNIT = "0123456789abcdef" * 3
PLAIN = answer("trim:keep_ratio=0.5", example(0), "7", kept=0.5)
SPOKEN = Transcript(
    **{field.name: getattr(PLAIN, field.name) for field in dataclasses.fields(Answer)},
    word_errors=1,
    words=9,
    character_errors=2,
    characters=40,
    tokens=12,
    cap=30,
    loops=False,
)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=80)


ODD = (
    *("", '"', "\\", "\\u", "\\ud800", "\\q", "9", "-", "e9", ".", "1.5", "null", "true", " ", "\t", "\x00"),
    *(', "seed": 1', '"spec": "x", ', "{", "}", "\u0661", "\ufeff", "A", "0" * 30, "NaN"),
)


def line(one: Answer) -> bytes:
    (row,) = answer_rows(UNIT, [one])
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode()


def both(content: bytes) -> tuple[Any, Any]:
    """What the quick and the strict reader make of a line; a message where they refuse it."""

    def outcome(read: Any) -> Any:
        try:
            return read()
        except ResultsError as error:
            return str(error)

    return outcome(lambda: LineReader().read("f", 3, content)), outcome(
        lambda: read_line("f, line 3", content)
    )


@settings(max_examples=200, deadline=None)
@given(
    of=st.sampled_from([PLAIN, SPOKEN]),
    texts=st.fixed_dictionaries(dict.fromkeys(("spec", "id", "task", "answer"), TEXTS)),
    seed=st.none() | st.integers(-(2**70), 2**70),
    kept=st.floats(0, 1),
    held=st.integers(0, 2**63 - 1),
    read=st.none() | st.floats(0, 1),
)
@always(of=PLAIN, texts={"answer": 'a "quoted"\nword \\ \u2028'}, seed=0, kept=0.0, held=0, read=None)
def test_what_was_written_is_read(
    of: Answer, texts: dict[str, str], seed: int | None, kept: float, held: int, read: float | None
) -> None:
    one = dataclasses.replace(of, **texts, seed=seed, kept_fraction=kept, bytes_held=held, read_fraction=read)
    assert (b"read_fraction" in line(one)) == (read is not None)
    assert both(line(one)) == (StoredAnswer(UNIT, one),) * 2


def test_what_kvprune_writes_takes_the_quick_way() -> None:
    quoted = dataclasses.replace(PLAIN, answer='"7"\n')
    for one in (PLAIN, SPOKEN, quoted, dataclasses.replace(SPOKEN, seed=3, kept_fraction=1.0)):
        assert LineReader()._quick(line(one)) == StoredAnswer(UNIT, one)


@settings(max_examples=400, deadline=None)
@given(
    of=st.sampled_from([PLAIN, SPOKEN, dataclasses.replace(PLAIN, answer='"\\ä')]),
    at=st.floats(0, 1, exclude_max=True),
    cut=st.integers(0, 12),
    more=st.sampled_from(ODD),
)
def test_whatever_is_changed_both_readers_agree(of: Answer, at: float, cut: int, more: str) -> None:
    content = line(of).decode()
    start = int(at * len(content))
    quick, strict = both((content[:start] + more + content[start + cut :]).encode())
    assert quick == strict


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"bytes_held": 500', '"bytes_held": -1'),
        ('"bytes_held": 500', '"bytes_held": 9999999999999999999'),
        ('"bytes_held": 500', '"bytes_held": 0500'),
        ('"bytes_held": 500', '"bytes_held": true'),
        ('"kept_fraction": 0.5', '"kept_fraction": 1.5'),
        ('"kept_fraction": 0.5', '"kept_fraction": 1'),
        ('"kept_fraction": 0.5', '"kept_fraction": 5e-1'),
        ('"answer": "7"', '"answer": "\\ud800"'),
        ('"answer": "7"', '"answer": "\\x"'),
        ('"answer": "7"', '"answer": "7", "answer": "8"'),
        ('"seed": null', '"seed": 0.0'),
        ('"unit": "0', '"unit": "G'),
    ],
)
def test_odd_lines_are_read_alike(old: str, new: str) -> None:
    content = line(PLAIN).decode()
    assert old in content
    quick, strict = both(content.replace(old, new).encode())
    assert quick == strict


MEASURE = """
import re, sys, time
from pathlib import Path
from kvprune.comparison.statistics.summary import summarise
from kvprune.comparison.storage.stored_run import read_run
from kvprune.session import registry
registry.load()  # imports transformers, whatever the folder holds
began = time.process_time()
stored = read_run(Path(sys.argv[1]))
read = time.process_time() - began
summarise(
    stored.configurations, stored.examples, stored.answers, {}, batch_size=16, device="cpu", reread=True,
    against="trim",
)
whole = time.process_time() - began
# ru_maxrss would be that of the process that started this one, if it was larger.
status = Path("/proc/self/status")
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1]) / 1024 if status.exists() else 0
print(len(stored.answers), read, whole, peak)
"""


@pytest.mark.slow
def test_a_hundred_thousand_answers_open_in_seconds(tmp_path: Path) -> None:
    folder = write_large_folder(tmp_path / "results", configurations=500, questions=200)
    assert describe_folder(folder).answers == 100_000
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True, check=True
    )
    answers, read, whole, megabytes = map(float, done.stdout.split())
    assert answers == 100_000
    assert read < 3
    assert whole < 5
    assert megabytes < 500
