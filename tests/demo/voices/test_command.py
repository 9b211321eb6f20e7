"""The command that makes synthetic speech."""

import json
import shutil

import pytest
from synthetic_voices import Hum

from kvprune.comparison.data.examples import read_examples
from kvprune.demo.voices import __main__ as voices
from kvprune.demo.voices.speech_set import write_speech_set
from kvprune.demo.voices.synthesisers import SYNTHESISERS


@pytest.fixture
def hum(monkeypatch):
    """Let the command use a synthesiser that needs no program."""

    def write(folder, count, seed, **options):
        return write_speech_set(folder, count, seed, [one], **options)

    one = Hum()
    monkeypatch.setattr(voices, "write_speech_set", write)
    return one


def test_it_writes_what_compare_reads(hum, tmp_path, capsys):
    assert voices.main(["--output", str(tmp_path / "new"), "--count", "4", "--seed", "2"]) == 0
    table = tmp_path / "new" / "speech.jsonl"
    assert len(read_examples(table)) == 4
    said = capsys.readouterr()
    assert said.out == f"4 recordings: kvprune compare --data {table} --model MODEL\n"
    assert json.loads((tmp_path / "new" / "manifest.json").read_text())["seed"] == 2


def test_the_default_has_power(hum, tmp_path):
    assert voices.main(["--output", str(tmp_path)]) == 0
    assert len(read_examples(tmp_path / "speech.jsonl")) == 216


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0"], "error: count must be at least 1, got 0"),
        (["--seed", "-1"], "error: seed must not be negative, got -1"),
    ],
)
def test_an_error_is_one_line(hum, tmp_path, capsys, arguments, message):
    assert voices.main(["--output", str(tmp_path), *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.strip().splitlines()[-1] == message


def test_a_missing_program(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert voices.main(["--output", str(tmp_path / "new")]) == 2
    assert "the program flite is not installed; on Debian: apt install flite" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_an_interruption_and_the_same_command_again(hum, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hum, "speak", interrupted(hum.speak, after=9))
    arguments = ["--output", str(tmp_path), "--count", "12"]
    assert voices.main(arguments) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    done = len(list((tmp_path / "audio").iterdir()))
    assert 0 < done < 12
    hum.spoken.clear()
    monkeypatch.undo()
    write_speech_set(tmp_path, 12, 0, [hum])
    assert len(hum.spoken) == 12 - done


def interrupted(speak, after):
    calls = []

    def interrupted(text, voice):
        calls.append(text)
        if len(calls) > after:
            raise KeyboardInterrupt
        return speak(text, voice)

    return interrupted


@pytest.mark.slow
@pytest.mark.skipif(
    not all(shutil.which(one.name) for one in SYNTHESISERS),
    reason="flite and espeak-ng are not both installed",
)
def test_the_real_voices(tmp_path):
    for folder in ("one", "two"):
        assert voices.main(["--output", str(tmp_path / folder), "--count", "54"]) == 0
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 56
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    found = read_examples(tmp_path / "one" / "speech.jsonl")
    assert all(1.0 < one.seconds < 15.0 for one in found)
