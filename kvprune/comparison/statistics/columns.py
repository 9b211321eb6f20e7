"""The answers of one configuration as arrays of draws and examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, TypeAlias

from kvprune.comparison.storage.answers import Answer, Key, Transcript

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers: TypeAlias = NDArray[np.float64]

__all__ = ["Columns", "Numbers", "SpeechColumns", "columns", "drawn_seeds"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SpeechColumns:
    """What only transcripts have; each is [draws, utterances].

    Attributes:
        word_errors: words that are wrong.
        words: words of the reference.
        character_errors: characters that are wrong.
        characters: characters of the reference.
        loops: 1 where the transcript repeats itself endlessly.
    """

    word_errors: Numbers
    words: Numbers
    character_errors: Numbers
    characters: Numbers
    loops: Numbers


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Columns:
    """The answers of one configuration; each array is [draws, examples].

    Attributes:
        seeds: seed of each draw; (None,) where nothing was drawn.
        correct: 1 for a right answer.
        agrees: 1 for the answer of the full cache.
        finished: 1 where the model ended the answer itself.
        kept: fraction of visible tokens kept.
        read: fraction of visible tokens that a decode step reads.
        held: bytes of the cross-attention cache.
        stock: bytes that stock transformers holds.
        speech: what only transcripts have; None for pictures.
    """

    seeds: tuple[int | None, ...]
    correct: Numbers
    agrees: Numbers
    finished: Numbers
    kept: Numbers
    read: Numbers
    held: Numbers
    stock: Numbers
    speech: SpeechColumns | None


_FIELDS = attrgetter("correct", "agrees_with_full", "finished", "kept_fraction", "bytes_held", "bytes_full")
_READ = attrgetter("read_fraction", "kept_fraction")
_SPEECH = attrgetter("word_errors", "words", "character_errors", "characters", "loops")


def drawn_seeds(keys: Iterable[Key]) -> dict[str, tuple[int, ...]]:
    """Return the seeds that each policy drew with, in ascending order, by spec."""
    found: dict[str, set[int]] = {}
    for spec, seed, _ in keys:
        if seed is not None:
            found.setdefault(spec, set()).add(seed)
    return {spec: tuple(sorted(seeds)) for spec, seeds in found.items()}


def columns(answers: Mapping[Key, Answer], spec: str, seeds: Sequence[int], ids: Sequence[str]) -> Columns:
    """Return the answers of one configuration as arrays.

    A policy may draw for some examples and not for others, such as those that fit into the budget whole.
    The one answer to such an example counts for every draw.

    Args:
        answers: Answers by spec, seed and id; none may be missing.
        spec: Spec of the configuration.
        seeds: Seeds that it drew with; empty if it drew nothing.
        ids: Examples, in the order of the arrays.

    Raises:
        KeyError: If an answer is missing.
    """
    import numpy as np

    def table(get: attrgetter[tuple[float, ...]], found: Iterable[Answer]) -> Numbers:
        values = np.array([get(answer) for answer in found], dtype=np.float64)
        return values.T.reshape(-1, len(draws), len(ids))  # [fields, draws, examples]

    draws: tuple[int | None, ...] = tuple(seeds) or (None,)
    found = [answers.get((spec, seed, name)) or answers[spec, None, name] for seed in draws for name in ids]
    correct, agrees, finished, kept, held, stock = table(_FIELDS, found)
    read, reads = table(_READ, found)  # NaN where a step reads all that is kept
    speech = None
    if isinstance(found[0], Transcript):
        names = ("word_errors", "words", "character_errors", "characters", "loops")
        speech = SpeechColumns(**dict(zip(names, table(_SPEECH, found), strict=True)))
    return Columns(
        seeds=draws,
        correct=correct,
        agrees=agrees,
        finished=finished,
        kept=kept,
        read=np.where(np.isnan(read), reads, read),
        held=held,
        stock=stock,
        speech=speech,
    )
