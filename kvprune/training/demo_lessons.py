"""Lessons from the embedded demo: many pictures, and fresh questions about them without end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvprune.demo.pictures import Glyph, draw
from kvprune.demo.prompts import prompt
from kvprune.demo.strokes import Split
from kvprune.demo.tasks import TASKS, Query, ask
from kvprune.demo.tiles import to_tiles
from kvprune.engine.guidance import Prompt
from kvprune.training.lessons import Lesson, answer_tensors

if TYPE_CHECKING:
    import numpy as np

__all__ = ["DemoLessons"]

_AT_ONCE = 16
"""Pictures that the vision tower sees at once."""

_PICTURES, _QUESTIONS = 14, 15
"""Last part of the seeds of pictures and of questions; no example of the demo has seeds of four numbers."""


class DemoLessons:
    """Lessons about pictures that are drawn in the beginning, with questions that are drawn for each lesson.

    The pictures to learn from show drawings on which the model was trained. Those of validation show others,
    as those of `kvprune compare` do, and are none of these: their random numbers are different.

    Args:
        model: The demo's model.
        processor: Its processor.
        seed: Another seed gives other lessons.
        pictures: Number of pictures to learn from.
        batch: Questions in each lesson.
        validation: Number of pictures for validation, with eight questions each.
        on_progress: Called with the pictures drawn so far, and all.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        seed: int = 0,
        pictures: int = 1000,
        batch: int = 128,
        validation: int = 64,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._model, self._processor, self._seed, self._batch = model, processor, seed, batch
        self._on_progress = on_progress
        self._counts = pictures, validation
        self._train = self._bank("train", pictures)
        self._held_out = self._bank("held-out", validation)

    @property
    def source(self) -> str:
        """What the lessons are made of."""
        pictures, validation = self._counts
        return (
            f"embedded demo, seed {self._seed}, {pictures} pictures to learn from, {self._batch} questions "
            "in "
            f"each lesson, {validation} pictures for validation"
        )

    def lesson(self, number: int) -> Lesson:
        """Return a lesson to learn from; it depends on the number and the seed."""
        rng = _numbers(self._seed, number, 1, _QUESTIONS)
        return self._lesson(rng, self._train, rng.integers(len(self._train[0]), size=self._batch).tolist())

    def validation(self) -> Sequence[Lesson]:
        """Return the lessons that nobody learns from."""
        rng = _numbers(self._seed, 0, 0, _QUESTIONS)
        which = [index for index in range(len(self._held_out[0])) for _ in range(8)]
        return [
            self._lesson(rng, self._held_out, which[start : start + self._batch])
            for start in range(0, len(which), self._batch)
        ]

    def _bank(self, split: Split, count: int) -> tuple[list[tuple[Glyph, ...]], Tensor, dict[str, Tensor]]:
        """Draw pictures; return what they show, their features ``[P, S, C]``, and how they are tiled."""
        shown: list[tuple[Glyph, ...]] = []
        features, device, inner = [], self._model.device, self._model.model
        tiling: dict[str, Tensor] = {}
        for start in range(0, count, _AT_ONCE):
            pictures = [
                draw(_numbers(self._seed, number, int(split == "train"), _PICTURES), split)
                for number in range(start, min(start + _AT_ONCE, count))
            ]
            shown += [picture.glyphs for picture in pictures]
            pixels = {name: tensor.to(device) for name, tensor in vars(to_tiles(pictures)).items()}
            with torch.no_grad():
                seen = inner.multi_modal_projector(inner.vision_model(**pixels).last_hidden_state)
            features.append(seen.reshape(len(pictures), -1, seen.shape[-1]))
            tiling = {name: tensor[:1] for name, tensor in pixels.items() if name != "pixel_values"}
            self._on_progress(len(shown), count)
        return shown, torch.cat(features), tiling

    def _lesson(
        self,
        rng: np.random.Generator,
        bank: tuple[list[tuple[Glyph, ...]], Tensor, dict[str, Tensor]],
        which: Sequence[int],
    ) -> Lesson:
        """Ask one question about each of some pictures."""
        shown, features, tiling = bank
        asked, pictures = [], []
        for index in which:
            query = None
            while query is None:  # some pictures permit no question of a task
                query = ask(str(rng.choice(TASKS)), rng, shown[index])
            asked.append(query)
            pictures.append(index)
        text, answers = _texts(self._processor, asked)
        device = features.device
        tokens, written = answer_tensors(answers, device)
        arguments = {name: tensor.to(device) for name, tensor in text.items()}
        arguments |= {name: tensor.expand(len(asked), *tensor.shape[1:]) for name, tensor in tiling.items()}
        chosen = torch.tensor(pictures).to(device)
        return Lesson(Prompt(arguments, features[chosen]), tokens, written)


def _numbers(*seeds: int) -> np.random.Generator:
    import numpy as np  # comes with the extra that the demo needs

    return np.random.default_rng(seeds)


def _texts(processor: Any, asked: Sequence[Query]) -> tuple[dict[str, Tensor], list[list[int]]]:
    """Return prompts, padded on the left, and the tokens of answers with their end."""
    tokenizer = processor.tokenizer
    image = tokenizer.convert_tokens_to_ids("<|image|>")
    before, after = prompt(processor, "\0").split("\0")
    heads = tokenizer([f"{before}{one.question}{after}" for one in asked]).input_ids
    tails = tokenizer([one.answer for one in asked]).input_ids
    longest = max(map(len, heads))
    ids = torch.full((len(asked), longest), tokenizer.pad_token_id)
    mask = torch.zeros(len(asked), longest, dtype=torch.int64)
    cross = torch.zeros(len(asked), longest, 1, 4, dtype=torch.int64)
    for row, head in enumerate(heads):
        start = longest - len(head)
        ids[row, start:] = torch.tensor(head)
        mask[row, start:] = 1
        cross[row, start + head.index(image) :] = 1
    text = {"input_ids": ids, "attention_mask": mask, "cross_attention_mask": cross}
    return text, [[*tail, tokenizer.eos_token_id] for tail in tails]
