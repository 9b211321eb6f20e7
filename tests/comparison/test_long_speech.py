"""Recordings longer than Whisper's window are transcribed window by window."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy
import pytest
import soundfile
import torch
from speech_helpers import RATE, load, recording, speech_file, tiny_checkpoint

from kvprune.comparison import Settings, compare
from kvprune.comparison.data.examples import Example, Utterance, read_examples
from kvprune.comparison.execution.batches import ask, batches
from kvprune.comparison.execution.enough import Enough
from kvprune.comparison.execution.speech import SpeechGenerator
from kvprune.comparison.execution.transcripts import cap_after, repeats
from kvprune.comparison.plan.grid import expand
from kvprune.comparison.storage.answers import Transcript
from kvprune.comparison.verification.verification import verify
from kvprune.demo import recordings

SPECS = ("trim:keep_ratio=0.2", "norm:keep_ratio=0.2,reach=onward")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Whisper that hears one second, and tells time."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("whisper") / "model", times=51)
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text())
    first = settings["no_timestamps_token_id"] + 1
    settings["suppress_tokens"] = [token for token in settings["suppress_tokens"] if token < first]
    settings["max_initial_timestamp_index"] = 10
    path.write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def generator(model: Path) -> SpeechGenerator:
    return load(model, max_new_tokens=24)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = speech_file(tmp_path_factory.mktemp("speech"))
    for number, seconds in enumerate((2.6, 1.3, 0.8)):
        recording(path.parent / f"s{number}.flac", seconds, number)
    return path


@pytest.fixture(scope="module")
def examples(data: Path) -> tuple[Example, ...]:
    return read_examples(data)


def transcripts(
    generator: SpeechGenerator, examples: tuple[Example, ...], spec: str = "full"
) -> list[Transcript]:
    """Return what a configuration writes, after the full cache."""
    inputs, full = generator.encode(examples), {}
    found = []
    for one in expand([spec], []):
        found = ask(generator, examples, inputs, one, 0, full)
        full = full or {answer.id: answer for answer in found}
    assert all(isinstance(answer, Transcript) for answer in found)
    return found  # type: ignore[return-value]


def by_stock(generator: SpeechGenerator, example: Example) -> str:
    """Transcribe one recording with the untouched model and the options that the page names."""
    assert isinstance(example, Utterance)
    samples, _ = soundfile.read(example.file, dtype="float32")
    features = generator.processor.feature_extractor(
        samples, sampling_rate=RATE, truncation=False, padding="longest", return_tensors="pt"
    )
    out = generator.model.generate(
        features.input_features,
        language="en",
        task="transcribe",
        return_timestamps=True,
        max_new_tokens=24,
        do_sample=False,
        num_beams=1,
    )
    (text,) = generator.processor.batch_decode(out, skip_special_tokens=True)
    return str(text).strip()


def test_transcripts_of_the_full_cache_are_those_of_the_untouched_model(
    generator: SpeechGenerator, examples: tuple[Example, ...]
) -> None:
    generator.check(examples)
    found = transcripts(generator, examples)
    assert [one.answer for one in found[:2]] == [by_stock(generator, one) for one in examples[:2]]
    assert [one.cap for one in found] == [3 * 24, 2 * 24, 24]  # one window's limit for each that it fills


@pytest.mark.parametrize("spec", SPECS)
def test_a_recording_does_not_depend_on_its_batch(
    generator: SpeechGenerator, examples: tuple[Example, ...], spec: str
) -> None:
    together = transcripts(generator, examples[:2], spec)
    for number, example in enumerate(examples[:2]):
        (alone,) = transcripts(generator, (example,), spec)
        assert dataclasses.replace(alone, bytes_held=0) == dataclasses.replace(together[number], bytes_held=0)
        assert alone.kept_fraction == pytest.approx(0.2, abs=0.03)
        assert abs(alone.bytes_held - together[number].bytes_held) < 0.2 * alone.bytes_full


@pytest.mark.parametrize("spec", SPECS)
def test_pruned_transcripts_are_cut_at_their_caps(
    generator: SpeechGenerator, examples: tuple[Example, ...], spec: str
) -> None:
    full, found = transcripts(generator, examples), transcripts(generator, examples, spec)
    for whole, answer in zip(full, found, strict=True):
        assert answer.cap == min(whole.cap, cap_after(whole.tokens))
        assert answer.tokens <= answer.cap
        assert answer.receipt != whole.receipt


def test_a_recording_that_has_written_enough_is_ended() -> None:
    enough = Enough([5, 3], padding=0)

    def ends(*lengths: int) -> list[bool]:
        return enough(torch.ones(len(lengths), max(lengths), dtype=torch.long), torch.empty(0)).tolist()

    enough.begin_window(torch.tensor([[0, 200], [0, 100]]))  # a prompt of 4
    assert [ends(5, 5), ends(6, 6), ends(7, 7)] == [[False, False], [False, False], [False, True]]
    enough.begin_window(torch.tensor([[60, 200], [100, 100]]))  # the second recording has ended
    assert [ends(9), ends(10)] == [[False], [True]]
    enough.begin_window(torch.tensor([[160, 200], [100, 100]]))
    assert ends(5) == [True]


def test_only_a_window_that_repeats_itself_is_a_loop() -> None:
    words = numpy.random.default_rng(0).integers(97, 123, 30_000)
    text = "".join(" " if one % 5 == 0 else chr(one) for one in words)
    assert not repeats(text, is_long=True)
    assert repeats(text[:5000] + "and he was " * 90 + text[5000:], is_long=True)


def test_long_recordings_have_batches_of_their_own(examples: tuple[Example, ...]) -> None:
    long, *short = examples
    assert isinstance(long, Utterance)
    mixed = [short[0], dataclasses.replace(long, seconds=31.0), short[1]]
    assert [[one.id for one in batch] for batch in batches(mixed, 16)] == [["s1", "s2"], ["s0"]]


def test_a_comparison_of_long_recordings_is_verified(model: Path, data: Path, tmp_path: Path) -> None:
    summary = compare(
        list(SPECS),
        [],
        Settings(
            model=str(model),
            data=data,
            output=tmp_path / "results",
            repetitions=1,
            max_new_tokens=24,
            answer_attention=False,
        ),
    )
    assert summary.rows[0].spec == "full"
    assert summary.rows[0].kept_fraction == 1
    assert verify(tmp_path / "results", sample=None).reproduces


def concatenated(folder: Path, rounds: int) -> Path:
    """Write the utterances of the demo with pauses as one recording, and a data file that lists it."""
    source = Path(recordings.__file__).parent / "speech"
    rows = [json.loads(line) for line in (source / "speech.jsonl").read_text("utf-8").splitlines()] * rounds
    parts = []
    for row in rows:
        samples, rate = soundfile.read(source / row["audio"], dtype="float32")
        parts += [samples, numpy.zeros(round(0.7 * rate), "float32")]
    soundfile.write(folder / "long.flac", numpy.concatenate(parts), rate)
    text = " ".join(row["text"] for row in rows)
    path = folder / "long.jsonl"
    path.write_text(json.dumps({"id": "long", "audio": "long.flac", "text": text}) + "\n")
    return path


def test_the_references_that_see_the_answer_are_left_out(model: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    settings = Settings(
        model=str(model),
        data=concatenated(tmp_path, 2),
        output=tmp_path / "results",
        repetitions=0,
        max_new_tokens=2,
    )
    summary = compare(["trim"], [0.5], settings, on_note=notes.append)
    assert [row.spec for row in summary.rows] == ["full", "trim:keep_ratio=0.5"]
    assert any("answer-attention is left out: recording 'long' is read" in note for note in notes)
