"""Sentences of synthetic speech: distinct, of bounded length, prefix-stable, and fair to a recogniser."""

import re
from itertools import chain

import pytest

from kvprune.adapters.families.whisper_text import normaliser
from kvprune.demo.voices import sentences as module
from kvprune.demo.voices.sentences import (
    FEWEST_WORDS,
    MOST_SENTENCES,
    MOST_WORDS,
    sentences,
    vocabulary_digest,
)

MANY = sentences(1500, seed=4)


def test_they_are_distinct_and_of_bounded_length():
    assert len(set(MANY)) == len({sentence.lower() for sentence in MANY}) == 1500
    lengths = {len(sentence.split()) for sentence in MANY}
    assert lengths == set(range(FEWEST_WORDS, MOST_WORDS + 1))


def test_a_longer_list_begins_with_the_shorter_one():
    assert sentences(40, seed=4) == MANY[:40]
    assert sentences(0) == []
    assert not set(sentences(40, seed=5)) & set(MANY[:40])


def test_each_is_a_sentence():
    for sentence in MANY:
        assert re.fullmatch(
            r"[A-Z][a-z]*(,? [a-z]+)*[.?]", sentence.replace("Saturday", "day").replace("April", "a")
        )
        assert sentence.endswith("?") == (sentence.split()[0] in {"Did", "How", "Where"})


def test_every_template_and_word_occurs():
    text = " ".join(MANY).lower()
    assert [word for word in chain(*module._WORDS.values()) if word.lower() not in text] == []


def test_normalising_changes_no_word():
    """So reference and transcript can differ only by what was heard: no number, contraction or spelling."""
    normalise = normaliser("en")
    for sentence in MANY:
        assert normalise(sentence) == re.sub(r"[.,?]", "", sentence).lower()


def test_no_words_that_are_heard_alike():
    words = set(re.findall(r"[a-z]+", " ".join(chain(*module._WORDS.values(), module._TEMPLATES)).lower()))
    alike = (
        "one two four six eight second blue blew red flour flower hour past passed week weak grey pair pear"
    )
    assert not words & set(alike.split())


def test_an_article_fits_the_word_after_it():
    for sentence in MANY:
        assert not re.search(r"\b(a [aeiou]|an [^aeiou])", sentence.lower()), sentence


@pytest.mark.parametrize("count", [-1, MOST_SENTENCES + 1])
def test_a_count_out_of_range(count):
    with pytest.raises(ValueError, match=rf"count must be 0 to {MOST_SENTENCES}, got {count}"):
        sentences(count)


def test_a_negative_seed():
    with pytest.raises(ValueError, match="seed must not be negative, got -1"):
        sentences(1, seed=-1)


def test_the_digest_follows_the_templates(monkeypatch):
    before = vocabulary_digest()
    assert before == vocabulary_digest()
    monkeypatch.setattr(module, "_TEMPLATES", (*module._TEMPLATES, "the {animal} slept in the {thing}."))
    assert vocabulary_digest() != before
