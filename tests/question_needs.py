"""Which glyphs a question of the demo needs, and which encoder tokens show them."""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from kvprune.demo import Example
from kvprune.demo.architecture import MAX_TILES, PATCH
from kvprune.demo.glyphs import kind_of
from kvprune.demo.pictures import CELLS, PICTURE, TILE, draw
from kvprune.demo.tasks import ask
from kvprune.tokens.layout import Layout

Row = dict[str, float]
"""Numbers about one question, or their means over several, by name."""

LEAST_INK = 16
"""A patch with fewer pixels of a glyph's ink is not covered by it."""

LAYOUT = Layout.tiles(TILE // PATCH, torch.tensor([[PICTURE // TILE]]), MAX_TILES, class_token=True)


@dataclass(frozen=True)
class Question:
    """A question of the demo, and how many pixels of each glyph's ink each token has, int64 [260, glyphs]."""

    example: Example
    ink: Tensor

    @cached_property
    def needed(self) -> list[int]:
        """The glyphs that the question asks for or names, in the order in which an answer needs them."""
        task, glyphs = self.example.task, self.example.glyphs
        at = {glyph.cell: number for number, glyph in enumerate(glyphs)}
        words = re.findall(r"\w+", self.example.question)
        if cells := [word for word in words if word in CELLS]:
            first, last = (CELLS.index(cells[end]) for end in (0, -1))
            return [at[cell] for cell in (CELLS[first : last + 1] if task == "row" else cells)]
        # "which digit is red", "how many digits are red", "is there a red 2", "... is above the red 2"
        kind = {"read": words[1], "count": words[2].removesuffix("s")}.get(task)
        colour, name = (words[-1], None) if kind else words[-2:]
        looks = [(one.colour, kind_of(one.name) if kind else one.name) for one in glyphs]
        found = [number for number, look in enumerate(looks) if look == (colour, kind or name)]
        return found + ([at[self.example.answers[0].split()[0]]] if task == "beside" else [])

    @cached_property
    def covered(self) -> Tensor:
        """Which tokens each glyph covers, bool [260, glyphs]."""
        return self.ink >= LEAST_INK

    @cached_property
    def needs(self) -> Tensor:
        """Which tokens the question needs, bool [260]."""
        return self.covered[:, self.needed].any(1)

    @cached_property
    def shows(self) -> dict[str, Tensor]:
        """What each token shows: bool [260] each, of which exactly one is true."""
        assert LAYOUT.class_tokens is not None
        glyph, bare, of_class = self.covered.any(1), self.ink.sum(1) == 0, LAYOUT.class_tokens[0]
        return {"glyph": glyph, "edge": ~glyph & ~bare, "ground": bare & ~of_class, "class token": of_class}


def questions(task: str, count: int, seed: int = 0) -> Iterator[Question]:
    """Draw `demo.examples` again: examples do not say where the ink of each glyph is, pictures do."""
    side, key = PICTURE // PATCH, zlib.crc32(f"{task} held-out".encode())
    row, column = LAYOUT.places[0].unbind(-1)  # [260] each, -1 for class tokens
    for number in range(count):
        rng, query = np.random.default_rng([key, seed, number]), None
        while query is None:
            picture = draw(rng, "held-out")
            query = ask(task, rng, picture.glyphs)
        owner = torch.from_numpy(picture.owner.astype(np.int64))  # [224, 224]
        patches = owner.view(side, PATCH, side, PATCH).swapaxes(1, 2).flatten(2)  # [16, 16, pixels]
        ink = torch.stack([(patches == n + 1).sum(-1) for n in range(len(picture.glyphs))], -1)
        example = Example(task, picture.image(), query.question, (query.answer,), picture.glyphs)
        yield Question(example, torch.where(row[:, None] < 0, 0, ink[row, column]))


def means(rows: Iterable[Row]) -> Row:
    """Return the mean of each number over the rows that have it."""
    columns: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name, value in row.items():
            columns[name].append(value)
    return {name: sum(values) / len(values) for name, values in columns.items()}
