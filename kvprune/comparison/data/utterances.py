"""Recordings with the text that was spoken, and the rows that hold them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from kvprune.adapters.families.whisper_text import languages, normaliser
from kvprune.comparison.data.audio import WINDOW_SECONDS, read_audio
from kvprune.comparison.data.example import Example
from kvprune.comparison.data.rows import Row
from kvprune.errors import DataError
from kvprune.text import suggestion

__all__ = ["FIELDS", "Utterance", "read_utterance"]

FIELDS = ("audio", "text")
"""Fields that a row must have."""

_DEFAULT_LANGUAGE = "en"

_LONGEST_TEXT, _FASTEST = 5000, 40
"""Most characters of a text, and how many more each second of a long recording may have: nobody says more,
and normalising takes time that grows with the square."""


@dataclass(frozen=True, kw_only=True)
class Utterance(Example):
    """One recording to write down; `answers` holds its reference text alone.

    Attributes:
        language: language that is spoken, as Whisper names it, such as ``en``.
        seconds: length of the recording.
    """

    kind = "speech"

    language: str
    seconds: float

    @property
    def reference(self) -> str:
        """The text that was spoken."""
        return self.answers[0]

    @property
    def is_long(self) -> bool:
        """Whether it is longer than the window of the published Whisper models."""
        return self.seconds > WINDOW_SECONDS

    @property
    def content(self) -> list[object]:
        """What can change a result, as JSON values."""
        return [*super().content, self.language]


def read_utterance(row: Row) -> Utterance:
    """Read and check one row; the recording is decoded once.

    Raises:
        DataError: If a field is wrong, no word of the text is left after normalisation, or the recording
            cannot be read or is too long.
        ModuleNotFoundError: If a package that reads recordings is missing.
    """
    row.require(FIELDS)
    name, reference, language = row.id, row.text("text"), _language(row)
    audio = row.folder / row.text("audio")
    try:
        recording = read_audio(audio)
    except DataError as error:
        raise DataError(f"{row.where}: field 'audio': {error}") from error
    most = max(_LONGEST_TEXT, int(_FASTEST * recording.seconds))
    if len(reference) > most:
        raise row.wrong("text", f"it must have at most {most} characters")
    if not any(char.isalnum() for char in normaliser(language)(reference)):
        raise row.wrong("text", "no word of it is left after normalisation, so there is nothing to score")
    return Utterance(
        id=name,
        task=row.task,
        file=audio,
        answers=(reference,),
        file_sha256=hashlib.sha256(recording.content).hexdigest(),
        language=language,
        seconds=recording.seconds,
    )


def _language(row: Row) -> str:
    given = row.text("language", _DEFAULT_LANGUAGE)
    known = languages()
    code = known.get(given.strip().lower())
    if code is None:
        close = suggestion(given, known)
        raise row.wrong("language", f"it must be one that Whisper knows, such as 'en' or 'german'{close}")
    return code
