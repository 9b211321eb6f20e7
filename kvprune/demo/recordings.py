"""The recordings of the demo of speech: five sentences that a person read, and what was read."""

from __future__ import annotations

from pathlib import Path

__all__ = ["SPEECH_MODEL", "speech_data"]

SPEECH_MODEL = "openai/whisper-base"
"""The model of the demo of speech, 74 million parameters; it does not come with kvprune."""


def speech_data() -> Path:
    """Return the JSON-lines file of the recordings, for ``kvprune compare --data``.

    Each row has ``id``, ``audio`` (a FLAC file beside it) and ``text``. ``README.md`` beside it says where
    they come from.
    """
    return Path(__file__).resolve().parent / "speech" / "speech.jsonl"
