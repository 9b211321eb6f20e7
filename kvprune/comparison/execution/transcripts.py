"""Counts the errors of transcripts, limits their length, and finds those that repeat themselves endlessly."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

__all__ = ["Errors", "cap_after", "count_errors", "repeats"]

_LONGER, _MORE = Fraction(3, 2), 10
_MOST_COMPRESSION = 2.4
_PIECE = 450  # characters; about half a minute of speech, a window of Whisper


@dataclass(frozen=True, slots=True)
class Errors:
    """Errors of one transcript: words or characters that were substituted, deleted or inserted.

    Attributes:
        word_errors: errors in words.
        words: words of the reference.
        character_errors: errors in characters, blanks between words included.
        characters: characters of the reference, likewise.
    """

    word_errors: int
    words: int
    character_errors: int
    characters: int


def count_errors(reference: str, transcript: str) -> Errors:
    """Count the fewest errors that turn a reference into a transcript, both normalised.

    An empty transcript counts every word of the reference as deleted.

    Args:
        reference: What was spoken; holds a word at least.
        transcript: What was written down.
    """
    import jiwer

    words = jiwer.process_words(reference, transcript)
    characters = jiwer.process_characters(reference, transcript)
    return Errors(
        word_errors=words.substitutions + words.deletions + words.insertions,
        words=words.hits + words.substitutions + words.deletions,
        character_errors=characters.substitutions + characters.deletions + characters.insertions,
        characters=characters.hits + characters.substitutions + characters.deletions,
    )


def cap_after(tokens: int) -> int:
    """Return the limit on new tokens of a transcript, given the length of the full cache's transcript.

    A pruned cache often ends in endless repetition, up to the model's own limit. The word error rate would
    then say little but how high that limit is.

    Args:
        tokens: Tokens of the full cache's transcript.

    Example:
        >>> cap_after(20), cap_after(21)
        (40, 42)
    """
    return ceil(_LONGER * tokens) + _MORE


def repeats(transcript: str, *, is_long: bool = False) -> bool:
    """Whether a transcript repeats itself: its text shrinks to less than 1 / 2.4 when zlib compresses it.

    This is the threshold at which Whisper's own decoding takes the transcript of a window for a failure
    (Radford et al. 2022, section 4.5; ``compression_ratio_threshold``). Any long text shrinks that much, so
    transcripts of long recordings are judged in pieces of 450 characters; one that repeats itself is enough.

    Args:
        transcript: Text as the model wrote it.
        is_long: Whether the recording was longer than the model's window.

    Example:
        >>> repeats("He might even have been made amiable himself."), repeats("and he was " * 12)
        (False, True)
    """
    size = _PIECE if is_long else len(transcript)
    pieces = [transcript[start : start + size].encode() for start in range(0, len(transcript), size or 1)]
    return any(len(piece) > _MOST_COMPRESSION * len(zlib.compress(piece)) for piece in pieces)
