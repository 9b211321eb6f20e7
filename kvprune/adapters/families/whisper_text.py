"""The languages that Whisper knows, and how transcripts are normalised before errors are counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

__all__ = ["languages", "normaliser"]


@cache
def languages() -> Mapping[str, str]:
    """Return the code of each language by its names and its code, in lower case; ``german`` is ``de``."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    return {**{code: code for code in TO_LANGUAGE_CODE.values()}, **TO_LANGUAGE_CODE}


def normaliser(language: str, spelling: Mapping[str, str] | None = None) -> Callable[[str], str]:
    """Return the function that normalises a text before its errors are counted, as Whisper's authors do.

    English: lower case, no punctuation and no fillers; numbers, contractions and British spelling are made
    one. Other languages, and English with numbers of thousands of digits, as endless repetitions have: lower
    case, no punctuation. In both, what stands in brackets is left out.

    Args:
        language: Code of the language.
        spelling: American by British spelling, which comes with the tokenizer; None changes no spelling.
    """
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    english, basic = EnglishTextNormalizer(dict(spelling or {})), BasicTextNormalizer()

    def normalise(text: str) -> str:
        if language == "en":
            try:
                return str(english(text)).strip()
            except ValueError:  # Python converts no text of more than 4300 digits to a number
                pass
        return str(basic(text)).strip()

    return normalise
