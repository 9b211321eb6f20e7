"""A folder of synthetic speech: which sentence is spoken by whom and how, its files, and what they are."""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvprune.demo.voices.conditions import CONDITIONS, RATE, Recipe, prepared
from kvprune.demo.voices.sentences import FEWEST_WORDS, MOST_WORDS, sentences, vocabulary_digest
from kvprune.demo.voices.speech_folder import AGAIN, SpeechFolder, named
from kvprune.demo.voices.synthesisers import SYNTHESISERS, Synthesiser
from kvprune.errors import DataError, SynthesisError
from kvprune.session.packages import load_speech_package
from kvprune.text import printable

__all__ = ["Planned", "plan", "write_speech_set"]

_LONGEST = 30.0  # seconds; what Whisper hears at once
_PROBE = "The quick boat crossed the wide river."


@dataclass(frozen=True)
class Planned:
    """What one recording is going to be.

    Attributes:
        number: its place in the set, from 0.
        text: the sentence.
        condition: one of `CONDITIONS`.
        synthesiser: what speaks.
        voice: the synthesiser's voice.
        facts: numbers of its condition, see `Recipe.draw`.
    """

    number: int
    text: str
    condition: str
    synthesiser: Synthesiser
    voice: str
    facts: Mapping[str, float]

    @property
    def id(self) -> str:
        """Its id, such as ``0031-en-us+f3-noisy``."""
        return f"{self.number:04d}-{self.voice}-{self.condition}"

    @property
    def file(self) -> str:
        """Its file, relative to the folder."""
        return f"audio/{self.id}.flac"


def plan(
    count: int,
    seed: int = 0,
    synthesisers: Sequence[Synthesiser] = SYNTHESISERS,
    recipe: Recipe | None = None,
) -> list[Planned]:
    """Return what the first `count` recordings of a seed are going to be.

    Recording i depends only on the seed and i. Three in a row have one voice and each another condition, then
    comes the next voice: every 3 x voices recordings, each voice has spoken once in each condition.

    Args:
        count: Number of recordings.
        seed: Another seed gives other sentences, noise and silence.
        synthesisers: What speaks.
        recipe: Numbers of the conditions; None is the default.

    Raises:
        ValueError: If the count or the seed is out of range.
    """
    recipe = Recipe() if recipe is None else recipe
    speakers = [(one, voice) for one in synthesisers for voice in one.voices]
    planned = []
    for number, text in enumerate(sentences(count, seed)):
        condition = CONDITIONS[number % len(CONDITIONS)]
        synthesiser, voice = speakers[number // len(CONDITIONS) % len(speakers)]
        facts = recipe.draw(condition, _rng("facts", seed, number))
        planned.append(Planned(number, text, condition, synthesiser, voice, facts))
    return planned


def write_speech_set(
    folder: str | Path,
    count: int = 216,
    seed: int = 0,
    synthesisers: Sequence[Synthesiser] = SYNTHESISERS,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write recordings (FLAC of 16 bits, one channel, 16 kHz), `speech.jsonl` and `manifest.json`.

    Each line of `speech.jsonl` is a row for ``kvprune compare --data``; its task is the condition. The file
    is written when all recordings are there. Another call with the same folder continues an interrupted one,
    or lets the set grow: recordings that are there are kept.

    Args:
        folder: Folder to write to: a new or empty one, or one that this function wrote.
        count: Number of recordings.
        seed: See `plan`.
        synthesisers: What speaks.
        on_progress: Called with the number of recordings that are done, and of all.

    Returns:
        Path of `speech.jsonl`.

    Raises:
        ValueError: If the count or the seed is out of range.
        SynthesisError: If a synthesiser or voice is missing, two voices sound the same, or one fails.
        DataError: If the folder holds something else, or a set that another call would continue differently.
        ModuleNotFoundError: If the package soundfile or soxr is missing.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    recipe = Recipe()
    planned = plan(count, seed, synthesisers, recipe)
    target = SpeechFolder(Path(folder), _origin(seed, synthesisers, recipe))
    _check_voices_differ(synthesisers)
    held = target.claim()
    if held > count:
        raise DataError(
            f"{named(target.path)} holds {held} recordings, and {count} are asked for; ask for {held} or "
            "more, or choose another folder"
        )
    known = target.digests()
    rows = []
    for done, one in enumerate(planned):
        on_progress(done, count)
        rows.append(_row(target.path, one, seed, recipe, known.get(one.id)))
    target.finish(rows)
    on_progress(count, count)
    return target.table


def _row(folder: Path, one: Planned, seed: int, recipe: Recipe, known: str | None) -> dict[str, Any]:
    """Return the row of a recording, which is made unless it is there.

    Args:
        folder: The folder of the set.
        one: The recording.
        seed: The seed of the set.
        recipe: Numbers of the conditions.
        known: SHA-256 of the file by an earlier `speech.jsonl`, if that has the recording.
    """
    path = folder / one.file
    if not path.exists():
        SpeechFolder.write(path, _recording(one, seed, recipe))
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if known not in (None, digest):
        raise DataError(
            f"{named(path)} is not the recording that speech.jsonl lists (its SHA-256 differs); {AGAIN}"
        )
    return {
        "id": one.id,
        "task": one.condition,
        "audio": one.file,
        "text": one.text,
        "language": "en",
        "synthesiser": one.synthesiser.name,
        "voice": one.voice,
        **one.facts,
        "seconds": round(_samples(path, content) / RATE, 3),
        "sha256": digest,
    }


def _recording(one: Planned, seed: int, recipe: Recipe) -> bytes:
    """Return the FLAC of a recording."""
    soundfile = load_speech_package("soundfile")
    spoken = one.synthesiser.speak(one.text, one.voice)
    try:
        samples = prepared(spoken, recipe, one.facts, _rng("noise", seed, one.number))
    except SynthesisError as error:
        raise SynthesisError(f"recording {one.id}: {error}") from error
    if len(samples) > _LONGEST * RATE:
        raise SynthesisError(
            f"recording {one.id} lasts {len(samples) / RATE:.1f} s; Whisper hears {_LONGEST:g} s at once"
        )
    whole: NDArray[np.int16] = np.round(samples * 32767).astype(np.int16)
    file = io.BytesIO()
    soundfile.write(file, whole, RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def _samples(path: Path, content: bytes) -> int:
    """Return the number of samples of a recording after a check that it is whole."""
    soundfile = load_speech_package("soundfile")
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            found = (file.format, file.subtype, file.samplerate, file.channels)
            frames, data = int(file.frames), file.read(dtype="int16")
    except soundfile.SoundFileError as error:
        raise DataError(f"{named(path)} is damaged ({printable(str(error), 200)}); {AGAIN}") from error
    if found != ("FLAC", "PCM_16", RATE, 1) or len(data) != frames or not data.any():
        raise DataError(
            f"{named(path)} is no whole FLAC of 16 bits, one channel and {RATE} samples per second; {AGAIN}"
        )
    return frames


def _check_voices_differ(synthesisers: Sequence[Synthesiser]) -> None:
    """Raise if two voices give the same sound: a program may take another voice without saying so."""
    heard: dict[bytes, str] = {}
    for synthesiser in synthesisers:
        for voice in synthesiser.voices:
            sound, name = synthesiser.speak(_PROBE, voice), f"{synthesiser.name} {voice}"
            other = heard.setdefault(sound.samples.tobytes(), name)
            if other != name:
                raise SynthesisError(
                    f"voices {other!r} and {name!r} sound the same: {synthesiser.name} does not know one of "
                    "them; leave it out"
                )


def _origin(seed: int, synthesisers: Sequence[Synthesiser], recipe: Recipe) -> dict[str, Any]:
    """Return all that the recordings depend on, as the manifest holds it."""
    soundfile, soxr = load_speech_package("soundfile"), load_speech_package("soxr")
    return {
        "seed": seed,
        "synthesisers": {
            one.name: {
                "version": one.version(),
                "voices": one.voices,
                "settings": one.settings,
                "licence": one.licence,
            }
            for one in synthesisers
        },
        "conditions": recipe.facts(),
        "sentences": {
            "words": [FEWEST_WORDS, MOST_WORDS],
            "sha256_of_templates": vocabulary_digest(),
            "licence": "Apache-2.0, as kvprune",
        },
        "packages": {
            "numpy": np.__version__,
            "soxr": soxr.__version__,
            "soundfile": soundfile.__version__,
            "libsndfile": soundfile.__libsndfile_version__,
        },
    }


def _rng(purpose: str, seed: int, number: int) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(purpose.encode()), seed, number])
