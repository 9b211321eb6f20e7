"""Errors in words and characters, limits on length, and repetition."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprune.adapters.families.whisper_text import languages, normaliser
from kvprune.comparison.execution.transcripts import Errors, cap_after, count_errors, repeats


def distance(one: list[str] | str, other: list[str] | str) -> int:
    """Levenshtein's distance, by its recurrence."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        above, row = row, [i]
        for j, b in enumerate(other, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


@pytest.mark.parametrize(
    ("transcript", "word_errors", "character_errors"),
    [
        ("he was not", 0, 0),
        ("he is not", 1, 2),
        ("he not", 1, 4),
        ("he was was not", 1, 4),
        ("", 3, 10),
        ("a b c d e", 5, 8),
    ],
)
def test_errors_are_substitutions_deletions_and_insertions(
    transcript: str, word_errors: int, character_errors: int
) -> None:
    found = count_errors("he was not", transcript)
    assert found == Errors(word_errors=word_errors, words=3, character_errors=character_errors, characters=10)


_WORDS = st.lists(st.sampled_from(["a", "he", "was", "wasp", "not"]), max_size=8)


@given(_WORDS.filter(bool), _WORDS)
def test_errors_are_levenshteins_distance(reference: list[str], transcript: list[str]) -> None:
    one, other = " ".join(reference), " ".join(transcript)
    found = count_errors(one, other)
    assert (found.word_errors, found.words) == (distance(reference, transcript), len(reference))
    assert (found.character_errors, found.characters) == (distance(one, other), len(one))


def test_english_is_normalised_as_whispers_authors_do() -> None:
    normalise = normaliser("en")
    assert normalise("Mr. Dashwood's, uh, twenty-one (coughs) houses -- it's done!") == (
        "mister dashwood is 21 houses it is done"
    )
    assert normaliser("en", {"colour": "color"})("Colour") == "color"
    assert normalise("colour") == "colour"


def test_other_languages_keep_their_words() -> None:
    assert normaliser("de")("Äh, Straße <unv> Nr. 5!").split() == ["äh", "straße", "nr", "5"]


def test_a_number_of_thousands_of_digits_is_no_error() -> None:
    assert normaliser("en")("A " + "7" * 6000).split() == ["a", "7" * 6000]


def test_languages_have_names_and_codes() -> None:
    assert languages()["german"] == languages()["de"] == "de"
    assert len(set(languages().values())) >= 99


@given(st.integers(0, 500))
def test_a_cap_is_half_again_as_long_and_ten_tokens(tokens: int) -> None:
    assert cap_after(tokens) == (3 * tokens + 1) // 2 + 10


# What Whisper base wrote for the demo's recordings with `norm:keep_ratio=0.1,reach=onward`, cut at its caps.
_LOOPS = (
    "He He was He was He was He was He was He was He was He was He was He was He was He was He",
    "Unless Unless to unless to unless to unless to be be Rather to be Rather to be Rather to be Rather "
    "Rather to be Rather Rather to be Rather Rather to be Rather Rather to",
    "Had he had had he had had he had he had had he had he had he had he had he had he had he had he had he",
    "He might he might even even even even even even even even even even even even even even even even even",
)


@pytest.mark.parametrize("transcript", _LOOPS)
def test_endless_repetition_is_found(transcript: str) -> None:
    assert repeats(transcript)


@pytest.mark.parametrize(
    "transcript",
    [
        "",
        "no",
        "No, no, no!",
        "And Mr. John Dashwood had then leisure to consider how much there might be prudently in his power "
        "to do for them.",
        "Unless to be rather cold-hearted and rather selfish is to be ill-disposed.",
    ],
)
def test_speech_is_no_repetition(transcript: str) -> None:
    assert not repeats(transcript)
