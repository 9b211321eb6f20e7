"""English sentences of everyday words, made from templates and a seed, to be spoken by synthetic voices.

A recogniser's errors are counted on these sentences, so they avoid what would be counted as an error without
being misheard: digits and words for numbers, contractions, names of persons, words that sound like others
("blue", "blew") and words that are written in two ways ("grey", "gray").
"""

from __future__ import annotations

import hashlib
import json
import string
import zlib
from collections.abc import Mapping

import numpy as np

__all__ = ["FEWEST_WORDS", "MOST_SENTENCES", "MOST_WORDS", "sentences", "vocabulary_digest"]

FEWEST_WORDS, MOST_WORDS = 6, 14
"""Bounds on the words of a sentence, both included."""

MOST_SENTENCES = 10_000
"""How many sentences may be asked for; the templates give far more."""

_TEMPLATES = (
    "{person} {left} the {colour} {thing} {place} {time}.",
    "{time}, {person} walked {path} with the {animal}.",
    "{person} was {feeling} because {event}.",
    "please put the {trait} {thing} {place} before {person} comes home.",
    "if it rains tomorrow, {person} will stay at home and {task}.",
    "the {thing} that {person} bought {time} is {trait} but {trait}.",
    "when {event}, {person} and {person} decided to {task}.",
    "did {person} forget to {task} {time}?",
    "we enjoyed {food} with {food} {time}.",
    "the {colour} {animal} ran {path} and stopped {shelter}.",
    "{person} wants to {task} and then {task}.",
    "the {colour} {thing} is much {more} than the {colour} {thing}.",
    "nobody knew why {person} wanted to {task} {time}.",
    "{person} ordered {food} with {food} {time}.",
    "how long did it take {person} to {task}?",
    "{person} bought the {colour} {thing}.",
    "where did {person} put the {trait} {thing}?",
    "the {animal} looked {feeling} but {person} looked {feeling}.",
    "{person} found the {animal} {shelter}.",
)
"""A word in braces stands for one entry of `_WORDS`; no entry is taken twice in a sentence."""

_WORDS: Mapping[str, tuple[str, ...]] = {
    "person": (
        *("the teacher", "the doctor", "the farmer", "the driver", "the carpenter", "the manager"),
        *("my brother", "my sister", "my uncle", "my best friend", "his mother", "her father"),
        *("the old man", "the young woman", "the captain", "the new student", "the police officer"),
        *("the little boy", "the whole family"),
    ),
    "left": ("left", "found", "dropped", "forgot", "noticed", "lost", "placed", "saw"),
    "thing": (
        *("basket", "blanket", "letter", "clock", "umbrella", "suitcase", "bottle", "ladder", "mirror"),
        *("camera", "hammer", "jacket", "chair", "candle", "picture", "guitar", "newspaper"),
    ),
    "colour": ("green", "yellow", "brown", "white", "purple", "pink", "black", "silver"),
    "trait": (
        *("small", "heavy", "expensive", "beautiful", "old", "clean", "strong", "soft", "simple"),
        *("useful", "special", "modern"),
    ),
    "more": ("larger", "smaller", "cheaper", "heavier", "older", "lighter", "cleaner", "stronger"),
    "place": (
        *("near the window", "under the table", "behind the door", "in the kitchen", "on the top shelf"),
        *("in the garden", "at the station", "outside the library", "next to the bathroom"),
        *("in the back of the car", "at the end of the hall", "beside the river"),
    ),
    "shelter": (
        *("behind the house", "under the bridge", "among the trees", "in the tall grass"),
        *("under a picnic table", "behind the old wall", "in the empty box"),
    ),
    "path": (
        *("across the field", "along the river", "through the forest", "up the hill", "down the street"),
        *("over the bridge", "around the lake", "into the village", "across the park"),
    ),
    "time": (
        *("yesterday morning", "last summer", "after breakfast", "before the meeting", "on Saturday"),
        *("last night", "in the afternoon", "during the storm", "at the end of April"),
        *("on a cold morning", "after the concert", "early in the evening"),
    ),
    "animal": ("dog", "cat", "horse", "rabbit", "chicken", "elephant", "monkey"),
    "feeling": (
        *("happy", "tired", "surprised", "angry", "hungry", "nervous", "proud", "worried", "excited"),
        "confused",
    ),
    "event": (
        *("the lights went out", "the train was late", "it started to snow", "the music stopped"),
        *("the bus finally arrived", "the dog began to bark", "the rain stopped", "the sun came out"),
        *("somebody knocked on the door", "the water was too cold", "the bridge was closed"),
        "the phone was ringing",
    ),
    "task": (
        *("clean the kitchen", "finish the report", "call the office", "visit the museum", "fix the roof"),
        *("water the plants", "learn a new song", "wait for the train", "cook dinner"),
        *("wash the dishes", "plan the birthday party", "take a long walk", "read a good story"),
        *("sell the house", "paint the ceiling", "play the piano"),
    ),
    "food": (
        *("fresh bread", "vegetable soup", "hot chocolate", "a plate of rice", "roasted chicken"),
        *("orange juice", "a plate of cheese", "a bowl of salad", "a slice of pizza", "cold lemonade"),
        *("a glass of milk", "a jar of honey"),
    ),
}


def sentences(count: int, seed: int = 0) -> list[str]:
    """Return the first `count` sentences of a seed, all distinct.

    Sentence i depends only on the seed and i, so a longer list begins with the shorter one.

    Args:
        count: Number of sentences, at most `MOST_SENTENCES`.
        seed: Another seed gives other sentences; not negative.

    Raises:
        ValueError: If the count or the seed is out of range.
    """
    if not 0 <= count <= MOST_SENTENCES:
        raise ValueError(f"count must be 0 to {MOST_SENTENCES}, got {count}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    key = zlib.crc32(b"sentences")
    made: dict[str, None] = {}
    for number in range(count):
        rng = np.random.default_rng([key, seed, number])
        sentence = _compose(rng)
        while sentence in made or not FEWEST_WORDS <= len(sentence.split()) <= MOST_WORDS:
            sentence = _compose(rng)
        made[sentence] = None
    return list(made)


def vocabulary_digest() -> str:
    """Return a SHA-256 of the templates and the words: other ones give other sentences."""
    content = json.dumps([_TEMPLATES, _WORDS, FEWEST_WORDS, MOST_WORDS])
    return hashlib.sha256(content.encode()).hexdigest()


def _compose(rng: np.random.Generator) -> str:
    template = _TEMPLATES[int(rng.integers(len(_TEMPLATES)))]
    left = {kind: list(words) for kind, words in _WORDS.items()}
    parts: list[str] = []
    for literal, kind, _, _ in string.Formatter().parse(template):
        parts.append(literal)
        if kind is not None:
            parts.append(left[kind].pop(int(rng.integers(len(left[kind])))))
    sentence = "".join(parts)
    return sentence[0].upper() + sentence[1:]
