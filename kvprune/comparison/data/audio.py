"""Reads recordings (WAV and FLAC) as one channel of float32, or refuses them by name.

What a file claims is checked before anything is allocated for it. A file that was cut off or damaged is
refused where the format lets one notice: a WAV states how many bytes of samples it holds, and a FLAC has a
digest of its samples.
"""

from __future__ import annotations

import hashlib
import io
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvprune.errors import DataError
from kvprune.session.packages import load_speech_package
from kvprune.text import printable

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

__all__ = ["LONGEST_SECONDS", "WINDOW_SECONDS", "Recording", "read_audio", "resampled"]

WINDOW_SECONDS = 30.0
"""How much Whisper hears at once; it reads longer recordings window by window."""

LONGEST_SECONDS = 1800.0
"""How long a recording may be: its text is normalised in time that grows with the square."""

_LARGEST_FILE = 2**28
_LARGEST_SAMPLE = 2.0**32  # the spectrum of larger ones overflows float32; full scale is 1
_RATES = range(1000, 384_001)
_MOST_CHANNELS, _MOST_SAMPLES, _MOST_LONG_SAMPLES = 64, 2**25, 2**27
_MOST_PER_BYTE = 8  # samples; more than FLAC gets out of speech

_SUBTYPES = (
    *("PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"),
    *("ULAW", "ALAW", "IMA_ADPCM", "MS_ADPCM"),
)
"""Encodings that are read; others need decoders that are little used and little tested."""

_OTHERS = (
    (b"OggS", "an Ogg file"),
    (b"ID3", "an MP3 file"),
    (b"\xff\xfb", "an MP3 file"),
    (b"\xff\xf3", "an MP3 file"),
    (b"FORM", "an AIFF file"),
    (b"RF64", "an RF64 file"),
    (b".snd", "an AU file"),
    (b"caff", "a CAF file"),
    (b"\x1aE\xdf\xa3", "a Matroska or WebM file"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"GIF8", "a picture"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """A recording.

    Attributes:
        samples: float32 ``[n]``, one channel; full scale is 1.
        rate: samples per second.
        content: the bytes of its file.
    """

    samples: NDArray[numpy.float32]
    rate: int
    content: bytes

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return len(self.samples) / self.rate


def read_audio(path: Path) -> Recording:
    """Read a WAV or FLAC file; the channels are averaged.

    Raises:
        DataError: If there is no such file, or it is not a plain file, of another format, cut off or damaged,
            empty, longer than `LONGEST_SECONDS`, or holds samples that are not finite.
        ModuleNotFoundError: If the package soundfile is missing.
    """
    soundfile = load_speech_package("soundfile")
    content = _content(path)
    kind = _container(path, content)
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            frames, rate, channels, subtype = file.frames, file.samplerate, file.channels, file.subtype
            _check_claims(path, content, kind, subtype, frames, rate, channels)
            whole = kind == "FLAC" and subtype in _WIDTHS
            data: Any = file.read(dtype="int32" if whole else "float32", always_2d=True)  # [n, channels]
    except DataError:
        raise
    except Exception as error:  # soundfile raises errors of several classes for damaged files
        reason = printable(str(error), 200) or type(error).__name__
        raise DataError(f"{_named(path)} is not a readable recording ({reason})") from error
    if len(data) != frames:
        raise DataError(f"{_named(path)} is cut off: it says it holds {frames} samples, but has {len(data)}")
    if whole:
        _check_digest(path, content, data, _WIDTHS[subtype])
        data = data.astype("float32") / 2.0**31
    return Recording(samples=_one_channel(path, data), rate=rate, content=content)


def resampled(recording: Recording, rate: int) -> NDArray[numpy.float32]:
    """Return the samples at another rate, float32 ``[n]``.

    Raises:
        ModuleNotFoundError: If the package soxr is missing.
    """
    if rate == recording.rate:
        return recording.samples
    soxr = load_speech_package("soxr")
    samples: NDArray[numpy.float32] = soxr.resample(recording.samples, recording.rate, rate)
    return samples


_WIDTHS = {"PCM_S8": 1, "PCM_16": 2, "PCM_24": 3}
"""Bytes per sample of the kinds of FLAC."""


def _content(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"{_named(path)} is not a plain file")
        size = path.stat().st_size
        if size > _LARGEST_FILE:
            raise DataError(
                f"{_named(path)} has {size} bytes; no recording of {LONGEST_SECONDS:g} s needs more than "
                f"{_LARGEST_FILE}"
            )
        content = path.read_bytes()
    except FileNotFoundError:
        parent = _named(path.parent)
        raise DataError(f"no file at {_named(path)}; paths are relative to {parent}") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or printable(str(error), 200)
        raise DataError(f"cannot read {_named(path)}: {reason}") from error
    if not content:
        raise DataError(f"{_named(path)} is empty")
    return content


def _container(path: Path, content: bytes) -> str:
    """Return "WAV" or "FLAC", by how the file begins and not by its name."""
    if content[:4] == b"RIFF" and content[8:12] == b"WAVE":
        return "WAV"
    if content[:4] == b"fLaC":
        return "FLAC"
    what = next((name for start, name in _OTHERS if content.startswith(start)), None)
    if what is None and content[4:8] == b"ftyp":
        what = "an MP4 file"
    raise DataError(
        f"{_named(path)} is {what or 'no recording that can be read'}; recordings must be WAV or FLAC files"
    )


def _check_claims(
    path: Path, content: bytes, kind: str, subtype: str, frames: int, rate: int, channels: int
) -> None:
    """Raise if what the header says is impossible, or more than is read."""
    if subtype not in _SUBTYPES:
        raise DataError(f"{_named(path)} is encoded as {subtype}; save it as plain PCM, or as FLAC")
    if kind == "WAV":
        _check_data_chunk(path, content)
    elif _flac_stream(path, content)[0] == 0:
        raise DataError(f"{_named(path)} does not say how many samples it holds; encode it again")
    if frames < 1:
        raise DataError(f"{_named(path)} holds no samples")
    if rate not in _RATES or not 1 <= channels <= _MOST_CHANNELS:
        raise DataError(
            f"{_named(path)} says it has {rate} samples per second in {channels} channels; {_RATES.start} to "
            f"{_RATES.stop - 1} samples in at most {_MOST_CHANNELS} channels can be read"
        )
    if frames > LONGEST_SECONDS * rate:
        raise DataError(
            f"{_named(path)} lasts {frames / rate:.2f} s; a recording may last at most {LONGEST_SECONDS:g} "
            "s, so cut it at a pause"
        )
    # What a header claims is allocated, so a small file may not claim much.
    most = max(_MOST_SAMPLES, min(_MOST_LONG_SAMPLES, _MOST_PER_BYTE * len(content)))
    if frames * channels > most:
        raise DataError(
            f"{_named(path)} holds {frames} samples in {channels} channels, more than {most} "
            "together; save fewer channels, or fewer samples per second"
        )


def _check_data_chunk(path: Path, content: bytes) -> None:
    """Raise if a WAV is shorter than it says; libsndfile would read what is left of it."""
    position = 12
    while position + 8 <= len(content):
        name, size = struct.unpack_from("<4sI", content, position)
        position += 8
        if name == b"data":
            if size > len(content) - position:
                raise DataError(
                    f"{_named(path)} is cut off: it says it holds {size} bytes of samples, but has "
                    f"{len(content) - position}"
                )
            return
        position += size + size % 2
    raise DataError(f"{_named(path)} holds no samples: it has no data chunk")


def _flac_stream(path: Path, content: bytes) -> tuple[int, bytes]:
    """Return the number of samples that a FLAC states (0: unknown) and the digest of them (zeros: none)."""
    if len(content) < 42 or content[4] & 127 != 0:
        raise DataError(f"{_named(path)} is not a readable recording (its stream information is missing)")
    packed = int.from_bytes(content[18:26], "big")  # rate, channels, width, and 36 bits of samples
    return packed & (2**36 - 1), content[26:42]


def _check_digest(path: Path, content: bytes, data: Any, width: int) -> None:
    """Raise unless the samples of a FLAC, int32 ``[n, channels]``, are those that were encoded."""
    _, digest = _flac_stream(path, content)
    if not any(digest):
        return
    octets = data.astype("<i4").view("uint8").reshape(*data.shape, 4)[..., 4 - width :]  # the highest ones
    if hashlib.md5(octets.tobytes(), usedforsecurity=False).digest() != digest:
        raise DataError(f"{_named(path)} is damaged: its samples are not those that were encoded")


def _one_channel(path: Path, data: Any) -> Any:
    """Return the mean of the channels, float32 ``[n]``."""
    import numpy

    finite = numpy.isfinite(data)
    if not finite.all():
        raise DataError(
            f"{_named(path)} holds {int((~finite).sum())} samples that are NaN or infinite; "
            "samples must be numbers"
        )
    largest = float(numpy.abs(data).max())
    if largest > _LARGEST_SAMPLE:
        raise DataError(f"{_named(path)} holds samples up to {largest:.3g}; full scale is 1")
    return numpy.ascontiguousarray(data.mean(axis=1, dtype="float64").astype("float32"))


def _named(path: Path) -> str:
    return printable(str(path), 400)
