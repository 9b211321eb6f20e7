"""Lessons from a file of questions about pictures, the same kind of file that `kvprune compare` reads.

`kvprune.training.speech_lessons` has those from a file of recordings.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch

from kvprune.adapters.base import ModelAdapter
from kvprune.comparison.data.examples import Example, Kind
from kvprune.comparison.execution.generation import Generator
from kvprune.comparison.storage.addresses import digest
from kvprune.errors import TrainingError
from kvprune.text import shown
from kvprune.training.lessons import Lesson, Lessons, answer_tensors, prompt_of

__all__ = ["FileLessons", "require_apart", "split"]

_SHOWN = 3
"""How many examples a message names."""

_FILES: Mapping[Kind, tuple[str, str]] = {"pictures": ("picture", "show"), "speech": ("recording", "hold")}
"""What the files of examples of each kind are, and what an example does with its file."""


def split(
    examples: Sequence[Example], fraction: float, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Return examples to learn from and examples for validation, with no picture or recording in both.

    Args:
        examples: All examples, of one kind.
        fraction: Of the pictures or recordings, for validation; at least one.
        seed: Another seed takes others.

    Raises:
        TrainingError: If the fraction is not between 0 and 1, or all examples are about one file.
    """
    what = _FILES[examples[0].kind][0] if examples else "file"
    if not 0 < fraction < 1:
        raise TrainingError(f"the share of {what}s for validation is between 0 and 1, got {fraction!r}")
    files = sorted({example.file_sha256 for example in examples})
    if len(files) < 2:
        raise TrainingError(
            f"all {len(examples)} examples are about one {what}, so none is left for validation; give more "
            "examples, or others with --validation"
        )
    random.Random(seed).shuffle(files)
    held = set(files[: min(max(1, round(fraction * len(files))), len(files) - 1)])
    return (
        tuple(example for example in examples if example.file_sha256 not in held),
        tuple(example for example in examples if example.file_sha256 in held),
    )


def require_apart(learning: Sequence[Example], validation: Sequence[Example]) -> None:
    """Raise unless no example of validation is about a picture or a recording that is learned from.

    Raises:
        TrainingError: If one is, or there are no examples of either kind; names some.
    """
    for examples, what in ((learning, "learn from"), (validation, "validate with")):
        if not examples:
            raise TrainingError(f"there are no examples to {what}")
    kinds = {example.kind for example in (*learning, *validation)}
    if len(kinds) > 1:
        raise TrainingError(
            "examples to learn from and to validate with must be of one kind, got "
            f"{learning[0].kind} and {validation[0].kind}"
        )
    what, verb = _FILES[learning[0].kind]
    known = {example.file_sha256: example.id for example in learning}
    leaks = [
        (example.id, known[example.file_sha256]) for example in validation if example.file_sha256 in known
    ]
    if leaks:
        named = ", ".join(f"{shown(one, 60)} and {shown(other, 60)}" for one, other in leaks[:_SHOWN])
        more = f" and {len(leaks) - _SHOWN} more" if len(leaks) > _SHOWN else ""
        raise TrainingError(
            f"validation must {verb} {what}s that nobody learns from, but {len(leaks)} of its examples "
            f"{verb} one that an example to learn from {verb}s: {named}{more}; leave them out of one of the "
            "files"
        )


class FileLessons(Lessons):
    """Lessons about examples of a file, in another order each time they are all read.

    Args:
        generator: The model and its processor.
        adapter: Of that model, not attached.
        learning: Examples to learn from.
        validation: Examples that nobody learns from.
        seed: Of the order.
        batch: Examples in each lesson.
        answers: "full": what the model answers with all of its encoder tokens. "data": the first of the
            answers in the file.
        on_progress: Called with the number of examples whose answers are known, and all.

    Raises:
        TrainingError: If a file is in both, there are no examples, or an answer has no token.
    """

    def __init__(
        self,
        generator: Generator,
        adapter: ModelAdapter,
        learning: Sequence[Example],
        validation: Sequence[Example],
        *,
        seed: int = 0,
        batch: int = 8,
        answers: Literal["full", "data"] = "full",
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        require_apart(learning, validation)
        self._generator, self._adapter, self._seed, self._batch = generator, adapter, seed, batch
        self._learning, self._validation = tuple(learning), tuple(validation)
        self._kind = answers
        generator.check((*learning, *validation))
        self._answers = dict(self._answered(on_progress))

    @property
    def source(self) -> str:
        """What the lessons are made of."""
        contents = [[example.content for example in part] for part in (self._learning, self._validation)]
        return (
            f"{len(self._learning)} examples to learn from and {len(self._validation)} for validation "
            "(digest "
            f"{digest(contents)[:16]}), answers of {self._kind}, {self._batch} in each lesson, seed "
            f"{self._seed}"
        )

    def lesson(self, number: int) -> Lesson:
        """Return a lesson to learn from."""
        count = len(self._learning)
        chosen = []
        for place in range(number * self._batch, (number + 1) * self._batch):
            round_, within = divmod(place, count)
            chosen.append(self._learning[self._order(round_)[within]])
        return self._encoded(chosen)

    def validation(self) -> Sequence[Lesson]:
        """Return the lessons that nobody learns from."""
        return [self._encoded(part) for part in self._parts(self._validation)]

    def _order(self, round_: int) -> Sequence[int]:
        order = list(range(len(self._learning)))
        random.Random(f"{self._seed} {round_}").shuffle(order)
        return order

    def _parts(self, examples: Sequence[Example]) -> Sequence[Sequence[Example]]:
        return [examples[start : start + self._batch] for start in range(0, len(examples), self._batch)]

    def _encoded(self, examples: Sequence[Example]) -> Lesson:
        """Let the encoder see the pictures."""
        inputs = self._generator.encode(examples)
        with torch.no_grad(), prompt_of(self._adapter) as prompts:
            self._generator.model(**inputs)
        (prompt,) = prompts
        answers = [self._answers[example.digest] for example in examples]
        return Lesson(prompt, *answer_tensors(answers, prompt.text.device))

    def _answered(self, on_progress: Callable[[int, int], None]) -> Mapping[str, list[int]]:
        """Return the tokens of the answer to each example, with the token that ends it, by its digest.

        Not by its id: examples to learn from and for validation may come of two files that both count from 0.
        """
        examples = (*self._learning, *self._validation)
        if self._kind == "data":
            tokenizer = self._generator.processor.tokenizer
            return {
                example.digest: [
                    *tokenizer(example.answers[0], add_special_tokens=False).input_ids,
                    tokenizer.eos_token_id,
                ]
                for example in examples
            }
        found: dict[str, list[int]] = {}
        for part in self._parts(examples):
            new = self._generator.generate(self._generator.encode(part))  # [B, n]
            for example, row, length in zip(part, new.tolist(), self._generator.lengths(new), strict=True):
                found[example.digest] = row[: length + 1]
            on_progress(len(found), len(examples))
        return found
