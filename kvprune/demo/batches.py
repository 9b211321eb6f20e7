"""Training batches of the demo model: pictures and questions, each batch made from its number alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvprune.demo.handwriting import Handwriting, handwriting
from kvprune.demo.pictures import COLOURS, Picture
from kvprune.demo.prompts import Packed, pack
from kvprune.demo.recipe import Recipe
from kvprune.demo.tasks import TASKS, Query, ask, compose
from kvprune.demo.tiles import PatchLabels, Tiles, crowd, label_patches, to_tiles

if TYPE_CHECKING:
    from transformers import ProcessorMixin

__all__ = ["Batch", "Batches"]

_MIX = ("row", "count", "row", "read")  # tasks of the pictures after the first stage; half are the hardest


@dataclass(frozen=True)
class Batch:
    """Pictures, labels of their patches and, after the first stage, questions about them.

    Attributes:
        tiles: the pictures.
        labels: what each patch shows.
        text: the questions with their answers; None in the first stage.
    """

    tiles: Tiles
    labels: PatchLabels
    text: Packed | None


class Batches(torch.utils.data.Dataset[Batch]):
    """The batches of a recipe; each is made on demand, from a seed of its own.

    Args:
        recipe: The numbers of the training run.
        processor: Processor that questions are tokenised with.
        first: Step of the batch with index 0.
    """

    def __init__(self, recipe: Recipe, processor: ProcessorMixin, first: int = 0) -> None:
        self.recipe = recipe
        self.processor = processor
        self.first = first

    def __len__(self) -> int:
        """Return the number of batches from step `first` on."""
        return self.recipe.steps - self.first

    def __getitem__(self, index: int) -> Batch:
        """Make batch `index`."""
        torch.set_num_threads(1)  # this process makes batches; the other cores are for the training
        step = self.first + index
        hand = handwriting("train")
        rng = np.random.default_rng([self.recipe.seed, step])
        if step < self.recipe.see_steps:
            pictures = []
            for _ in range(self.recipe.pictures):
                large = rng.random() < 0.8
                pictures.append(crowd(rng, hand, (2, 2) if large else None))
            return Batch(to_tiles(pictures), label_patches(pictures), None)
        return self._with_questions(rng, hand)

    def _with_questions(self, rng: np.random.Generator, hand: Handwriting) -> Batch:
        pictures: list[Picture] = []
        queries: list[list[Query]] = []
        for number in range(self.recipe.pictures):
            picture, query = compose(_MIX[number % len(_MIX)], rng, hand)
            pictures.append(picture)
            queries.append([query, *_more_queries(rng, picture, query, self.recipe.questions - 1)])
        tiles = to_tiles(pictures)
        text = pack(self.processor, queries, tiles.aspect_ratio_mask.sum((1, 2)).tolist())
        return Batch(tiles, label_patches(pictures), text)


def _more_queries(rng: np.random.Generator, picture: Picture, first: Query, count: int) -> list[Query]:
    """Draw up to `count` other questions that the picture answers; rare kinds of answers more often."""
    asked = [ask(task, colour, picture.digits) for task in TASKS for colour in COLOURS]
    possible = [query for query in asked if query is not None and query != first]
    kinds = [query.answer if query.task == "count" else query.task for query in possible]
    chances = np.array([1 / kinds.count(kind) for kind in kinds])
    picks = rng.choice(len(possible), min(count, len(possible)), replace=False, p=chances / chances.sum())
    return [possible[int(pick)] for pick in picks]
