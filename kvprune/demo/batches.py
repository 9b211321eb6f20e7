"""Training batches of the demo model: pictures and questions, each batch made from its number alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvprune.demo.pictures import Picture, draw
from kvprune.demo.prompts import Packed, pack
from kvprune.demo.recipe import Recipe
from kvprune.demo.tasks import Query, ask
from kvprune.demo.tiles import PatchLabels, Tiles, label_patches, to_tiles

if TYPE_CHECKING:
    from transformers import ProcessorMixin

__all__ = ["Batch", "Batches"]


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
        step = self.first + index
        rng = np.random.default_rng([self.recipe.seed, step])
        pictures = [draw(rng, "train") for _ in range(self.recipe.pictures)]
        text = None
        if step >= self.recipe.see_steps:
            text = pack(self.processor, [self._questions(rng, picture) for picture in pictures])
        return Batch(to_tiles(pictures), label_patches(pictures), text)

    def _questions(self, rng: np.random.Generator, picture: Picture) -> Sequence[Query]:
        """Draw questions about a picture, in any order, so that none is always asked first."""
        tasks = rng.choice(list(self.recipe.mix), self.recipe.questions, p=self.recipe.shares)
        drawn = (ask(str(task), rng, picture.glyphs) for task in tasks)
        return [query for query in drawn if query is not None]
