"""Rows of recordings: every way in which a row or its file can be wrong is named."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import soundfile
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from speech_helpers import RATE, recording

from kvprune.comparison.data.audio import Recording, read_audio, resampled
from kvprune.comparison.data.examples import Utterance, digest, read_examples
from kvprune.errors import DataError
from kvprune.text import is_printable

Write = Callable[..., Path]


def row(**changes: Any) -> dict[str, Any]:
    """A good row with changes; a value of None removes the field."""
    whole = {"audio": "good.wav", "text": "he might", **changes}
    return {field: value for field, value in whole.items() if value is not None}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows beside a good recording named good.wav."""
    recording(tmp_path / "good.wav")

    def write(*rows: dict[str, Any]) -> Path:
        path = tmp_path / "speech.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
        return path

    return write


def one(path: Path) -> Utterance:
    (found,) = read_examples(path)
    assert isinstance(found, Utterance)
    return found


def test_rows_of_recordings_are_found_by_their_fields(write: Write, tmp_path: Path) -> None:
    first, second = read_examples(write(row(id="a", task="noisy", language="de"), row(text="Straße")))
    assert isinstance(first, Utterance)
    assert isinstance(second, Utterance)
    assert (first.id, first.task, first.language, first.kind) == ("a", "noisy", "de", "speech")
    assert (second.id, second.task, second.language, second.reference) == ("row-2", "all", "en", "Straße")
    assert first.seconds == 0.5
    assert first.file_sha256 == hashlib.sha256((tmp_path / "good.wav").read_bytes()).hexdigest()


def test_the_digest_sees_the_language_and_the_text(write: Write) -> None:
    plain = digest(read_examples(write(row())))
    assert plain == digest(read_examples(write(row(language="english"))))
    assert plain != digest(read_examples(write(row(language="de"))))
    assert plain != digest(read_examples(write(row(text="he might!"))))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(text=None), r"line 2: field 'text' is missing \(the row has: audio\)"),
        (row(audio=None), r"line 2: field 'audio' is missing"),
        (row(audio=3), r"line 2: field 'audio' is 3; it must be a non-empty string"),
        (row(text=" "), r"line 2: field 'text' is ' '"),
        (row(text="... -- !"), r"line 2: field 'text' is '... -- !'; no word of it is left after normal"),
        (row(text="(laughter)"), r"field 'text' is '\(laughter\)'; no word of it is left"),
        (row(text="uh"), r"field 'text' is 'uh'; no word of it is left"),
        (row(text="a " * 3000), r"field 'text' is .*; it must have at most 5000 characters"),
        (row(language="klingon"), r"field 'language' is 'klingon'; it must be one that Whisper knows, such"),
        (row(language="englsh"), r"field 'language' is 'englsh'; .*did you mean 'english'\?"),
        (row(language=["en"]), r"field 'language' is \['en'\]"),
        (row(audio="absent.wav"), r"line 2: field 'audio': no file at .*absent.wav"),
        (row(audio="."), r"line 2: field 'audio': .* is not a plain file"),
        (row(audio="a\0b"), r"line 2: field 'audio': .*null"),
        (row(audio="speech.jsonl"), r"speech.jsonl is no recording that can be read; .* WAV or FLAC"),
        (
            row(question="what?"),
            r"line 2: the row has 'question' of a question .* and 'audio', 'text' of a rec",
        ),
        (
            {"image": "good.png", "question": "what?", "answers": ["red"]},
            r"line 2: this row is about pictures, but line 1 is about speech; a file holds one kind",
        ),
    ],
)
def test_bad_rows_are_named(write: Write, bad: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_examples(write(row(), bad))


def test_a_language_without_words_of_its_own_alphabet_is_normalised_as_others(write: Write) -> None:
    assert one(write(row(text="uh", language="de"))).reference == "uh"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.wav", b"", "is empty"),
        ("text.wav", b"he might even", "is no recording that can be read"),
        ("song.wav", b"ID3\x04" + bytes(99), "is an MP3 file; recordings must be WAV or FLAC"),
        ("song.flac", b"OggS" + bytes(99), "is an Ogg file"),
        ("film.wav", bytes(4) + b"ftypisom" + bytes(99), "is an MP4 file"),
        ("head.wav", b"RIFF\x24\0\0\0WAVE", "is not a readable recording"),
        ("head.flac", b"fLaC", "is not a readable recording"),
    ],
)
def test_files_that_are_no_recordings_are_named(
    write: Write, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"line 1: field 'audio': .*{name} {message}"):
        read_examples(write(row(audio=name)))


def test_a_picture_named_wav_is_named(write: Write, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "odd.wav", "PNG")
    with pytest.raises(DataError, match=r"odd\.wav is a picture; recordings must be WAV or FLAC"):
        read_examples(write(row(audio="odd.wav")))


def test_a_pipe_is_refused_and_not_waited_for(write: Write, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(DataError, match=r"pipe\.wav is not a plain file"):
        read_examples(write(row(audio="pipe.wav")))


@pytest.mark.parametrize("name", ["long.wav", "long.flac"])
def test_half_an_hour_is_the_most(write: Write, tmp_path: Path, name: str) -> None:
    recording(tmp_path / name, 30.0, rate=8000)
    assert one(write(row(audio=name))).seconds == 30.0
    assert not one(write(row(audio=name))).is_long
    soundfile.write(tmp_path / name, numpy.zeros(1000 * 1800 + 1), 1000)
    with pytest.raises(DataError, match=rf"{name} lasts 1800.00 s; .* at most 1800 s, so cut it"):
        read_examples(write(row(audio=name)))


def test_a_text_may_be_longer_if_the_recording_is(write: Write, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "long.wav", numpy.zeros(1000 * 200), 1000)
    assert one(write(row(audio="long.wav", text="a " * 4000))).is_long
    with pytest.raises(DataError, match=r"field 'text' is .*; it must have at most 8000 characters"):
        read_examples(write(row(audio="long.wav", text="a " * 4001)))


@pytest.mark.parametrize("name", ["none.wav", "none.flac"])
def test_a_file_without_samples_is_named(write: Write, tmp_path: Path, name: str) -> None:
    soundfile.write(tmp_path / name, numpy.zeros(0), RATE)
    with pytest.raises(DataError, match=rf"{name} (holds no samples|is empty)"):
        read_examples(write(row(audio=name)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_samples_that_are_no_numbers_are_named(write: Write, tmp_path: Path, value: float) -> None:
    samples = numpy.zeros(99)
    samples[7] = value
    soundfile.write(tmp_path / "odd.wav", samples, RATE, subtype="DOUBLE")
    with pytest.raises(
        DataError, match=r"odd.wav holds (1 samples that are NaN or infinite|samples up to 1e\+30)"
    ):
        read_examples(write(row(audio="odd.wav")))


def test_silence_is_a_recording(write: Write, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "silent.wav", numpy.zeros(RATE), RATE)
    assert one(write(row(audio="silent.wav"))).seconds == 1.0


@pytest.mark.parametrize("name", ["whole.wav", "whole.flac"])
def test_a_file_that_was_cut_off_is_named(write: Write, tmp_path: Path, name: str) -> None:
    whole = recording(tmp_path / name, 2.0).read_bytes()
    for share in (0.99, 0.5, 0.1):
        (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(DataError, match=rf"{name} is (cut off|not a readable|damaged)"):
            read_examples(write(row(audio=name)))


def test_another_sample_in_a_flac_is_noticed(tmp_path: Path) -> None:
    path = recording(tmp_path / "a.flac", subtype="PCM_16")
    content = bytearray(path.read_bytes())
    content[26] ^= 1  # the digest of the samples
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.flac is damaged: its samples are not those that were encoded"):
        read_audio(path)


@pytest.mark.parametrize("subtype", ["PCM_S8", "PCM_16", "PCM_24"])
def test_flac_is_read_as_soundfile_reads_it(tmp_path: Path, subtype: str) -> None:
    path = recording(tmp_path / "a.flac", subtype=subtype)
    assert numpy.array_equal(read_audio(path).samples, soundfile.read(path, dtype="float32")[0])


@pytest.mark.parametrize(
    "subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"]
)
def test_wav_is_read_as_soundfile_reads_it(tmp_path: Path, subtype: str) -> None:
    path = recording(tmp_path / "a.wav", subtype=subtype)
    found = read_audio(path)
    assert numpy.array_equal(found.samples, soundfile.read(path, dtype="float32")[0])
    assert found.samples.dtype == numpy.float32


def test_an_encoding_that_is_little_tested_is_refused(tmp_path: Path) -> None:
    path = recording(tmp_path / "a.wav", subtype="GSM610")
    with pytest.raises(DataError, match=r"a\.wav is encoded as GSM610; save it as plain PCM, or as FLAC"):
        read_audio(path)


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = numpy.linspace(-0.5, 0.5, 99), numpy.full(99, 0.25)
    soundfile.write(tmp_path / "a.wav", numpy.stack([left, right], 1), RATE, subtype="FLOAT")
    assert numpy.allclose(read_audio(tmp_path / "a.wav").samples, (left + right) / 2, atol=1e-7)


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000, 96_000])
def test_other_rates_are_resampled(tmp_path: Path, rate: int) -> None:
    time = numpy.arange(rate) / rate
    soundfile.write(tmp_path / "a.wav", 0.5 * numpy.sin(2 * numpy.pi * 440 * time), rate, subtype="FLOAT")
    found = resampled(read_audio(tmp_path / "a.wav"), RATE)
    wanted = 0.5 * numpy.sin(2 * numpy.pi * 440 * numpy.arange(RATE) / RATE)
    assert len(found) == RATE
    assert found.dtype == numpy.float32
    assert numpy.abs(found - wanted)[500:-500].max() < 1e-3  # a filter begins and ends somewhere


def claiming(name: str, content: bytes, *, frames: int, rate: int, channels: int = 1) -> bytes:
    """Return a file whose header says something else."""
    changed = bytearray(content)
    if name.endswith("wav"):
        changed[22:28] = struct.pack("<HI", channels, rate)
        changed[40:44] = struct.pack("<I", 2 * frames)
    else:
        packed = int.from_bytes(changed[18:26], "big") & (31 << 36)
        packed |= min(rate, 2**20 - 1) << 44 | (channels - 1) << 41 | frames
        changed[18:26] = packed.to_bytes(8, "big")
    return bytes(changed)


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
@pytest.mark.parametrize(
    ("frames", "rate", "channels"),
    [(2**31 - 1, 2**31 - 1, 1), (2**31 - 1, 384_000, 8), (30 * 384_000, 384_000, 8), (0, RATE, 1), (9, 0, 1)],
)
def test_what_a_header_claims_is_not_allocated(
    tmp_path: Path, name: str, frames: int, rate: int, channels: int
) -> None:
    path = recording(tmp_path / name, subtype="PCM_16")
    path.write_bytes(claiming(name, path.read_bytes(), frames=frames, rate=rate, channels=channels))
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            read_audio(path)
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


def test_a_file_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.wav").open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(
        DataError, match=r"huge\.wav has 1099511627776 bytes; no recording of 1800 s needs more"
    ):
        read_audio(tmp_path / "huge.wav")


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    kinds = {"a.wav": "PCM_16", "b.wav": "FLOAT", "c.wav": "MS_ADPCM", "d.flac": "PCM_16", "e.flac": "PCM_24"}
    return {name: recording(folder / name, 0.2, subtype=kind).read_bytes() for name, kind in kinds.items()}


_DAMAGE = st.lists(
    st.tuples(st.one_of(st.integers(0, 60), st.integers(0, 10_000)), st.integers(0, 255)), max_size=4
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from("abcde"), length=st.floats(0, 1), damage=_DAMAGE)
@example(name="d", length=1.0, damage=[])
def test_a_damaged_recording_is_read_or_a_data_error(
    whole_files: dict[str, bytes], tmp_path: Path, name: str, length: float, damage: list[tuple[int, int]]
) -> None:
    whole = next(content for file, content in whole_files.items() if file.startswith(name))
    content = bytearray(whole[: round(len(whole) * length)])
    for place, value in damage:
        if content:
            content[place % len(content)] = value
    path = tmp_path / "damaged"
    path.write_bytes(content)
    refused, found = "", None
    try:
        found = read_audio(path)
    except DataError as error:
        refused = str(error)
    assert is_printable(refused)
    assert len(refused) < 1000
    if found is None:
        assert bytes(content) != whole
        return
    assert found.samples.ndim == 1
    assert 0 < len(found.samples) <= 30 * found.rate
    assert numpy.isfinite(found.samples).all()
    if name in "de" and content[18:42] == whole[18:42] and any(content[26:42]):
        expected, _ = soundfile.read(io.BytesIO(whole), dtype="float32")
        assert numpy.array_equal(found.samples, expected), "a FLAC with another sample is damaged"


@pytest.mark.parametrize("module", ["soundfile", "soxr"])
def test_a_missing_package_is_named(write: Write, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    path = write(row())
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf'{module}, .*pip install "kvprune\[speech\]"'):
        resampled(read_audio(path.parent / "good.wav"), 8000)


def test_a_recording_at_the_rate_is_not_resampled() -> None:
    samples = numpy.zeros(5, dtype=numpy.float32)
    assert resampled(Recording(samples=samples, rate=RATE, content=b""), RATE) is samples
