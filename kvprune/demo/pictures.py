"""Pictures full of coloured glyphs on photographs and textures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kvprune.demo.glyphs import BOX, GLYPHS, KINDS, drawings
from kvprune.demo.grounds import ground
from kvprune.demo.strokes import Split

TILE = 112
"""Side of a tile in pixels."""

PICTURE = 2 * TILE
"""Side of a picture in pixels: two tiles down and two across."""

COLOURS = ("red", "green", "blue", "yellow", "pink", "white")
"""Colours of glyphs."""

GRID = 6
"""Rows and columns of cells that a picture has; a cell shows one glyph at most."""

CELLS = tuple(f"{column}{row + 1}" for row in range(GRID) for column in "abcdef")
"""Names of the cells, row by row from the top: the column's letter and the row's number, as in chess."""

FILLED = (26, 32)
"""Least and largest number of glyphs in a picture."""

_INK = np.array(
    [[210, 25, 30], [20, 150, 45], [30, 60, 215], [245, 215, 25], [240, 70, 190], [245, 245, 245]],
    dtype=np.float32,
)
_SIZES = (17, 21)  # least and largest height of a glyph in pixels
_JITTER = 6.0  # how far a glyph's centre may lie from its cell's centre, in pixels
_KIND_SHARES = {"digit": 0.42, "letter": 0.36, "shape": 0.22}


@dataclass(frozen=True)
class Glyph:
    """One glyph of a picture.

    Attributes:
        name: which glyph, one of `GLYPHS`.
        colour: its colour, one of `COLOURS`.
        row: its row of cells, 0 at the top.
        column: its column of cells, 0 on the left.
        x: horizontal position of its centre in pixels.
        y: vertical position of its centre in pixels.
        size: its height in pixels.
    """

    name: str
    colour: str
    row: int
    column: int
    x: float
    y: float
    size: int

    @property
    def cell(self) -> str:
        """Return the name of its cell."""
        return CELLS[self.row * GRID + self.column]


@dataclass(frozen=True)
class Picture:
    """A picture and its glyphs.

    Attributes:
        pixels: uint8 [224, 224, 3].
        glyphs: all glyphs of the picture, row by row.
        owner: which glyph's ink covers a pixel, int16 [224, 224]: 1 + its index in `glyphs`; 0 without ink.
    """

    pixels: NDArray[np.uint8]
    glyphs: tuple[Glyph, ...]
    owner: NDArray[np.int16]

    def image(self) -> Image.Image:
        """Return the picture as a PIL image in mode RGB."""
        return Image.fromarray(self.pixels)


def draw(rng: np.random.Generator, split: Split, filled: tuple[int, int] = FILLED) -> Picture:
    """Draw a picture: which cells hold which glyphs, then the ground, then the glyphs.

    Each picture has colours that are frequent and others that are rare, so that there is something to count
    as well as something that is there only once.

    Args:
        rng: Source of all randomness.
        split: Whose drawings and photographs to use, "train" or "held-out".
        filled: Least and largest number of glyphs.

    Raises:
        ValueError: If `split` is unknown.
        ImportError: If scikit-learn or matplotlib is not installed.
    """
    return paint(rng, place(rng, filled), split)


def place(rng: np.random.Generator, filled: tuple[int, int] = FILLED) -> tuple[Glyph, ...]:
    """Draw which cells hold which glyphs, in which colour, and where in its cell each lies."""
    count = int(rng.integers(filled[0], filled[1] + 1))
    cells = np.sort(rng.choice(GRID * GRID, count, replace=False))
    kinds = rng.choice(len(KINDS), count, p=list(_KIND_SHARES.values()))
    members = list(KINDS.values())
    names = [members[kind][int(rng.integers(len(members[kind])))] for kind in kinds]
    colours = rng.choice(len(COLOURS), count, p=rng.dirichlet([2.5] * len(COLOURS)))
    side = PICTURE / GRID
    rows, columns = np.divmod(cells, GRID)
    x = (columns + 0.5) * side + rng.uniform(-_JITTER, _JITTER, count)
    y = (rows + 0.5) * side + rng.uniform(-_JITTER, _JITTER, count)
    sizes = rng.integers(_SIZES[0], _SIZES[1] + 1, count)
    return tuple(
        Glyph(
            name=names[n],
            colour=COLOURS[colours[n]],
            row=int(rows[n]),
            column=int(columns[n]),
            x=float(x[n]),
            y=float(y[n]),
            size=int(sizes[n]),
        )
        for n in range(count)
    )


def paint(rng: np.random.Generator, glyphs: tuple[Glyph, ...], split: Split) -> Picture:
    """Paint glyphs over a ground."""
    canvas = ground(rng, PICTURE, split)
    owner = np.zeros((PICTURE, PICTURE), dtype=np.int16)
    bank = drawings(split)
    names = np.array([GLYPHS.index(glyph.name) for glyph in glyphs], dtype=np.int64)
    sizes = np.array([glyph.size for glyph in glyphs], dtype=np.int64)
    opacity = bank.write(rng, bank.pick(rng, names), sizes)
    inks = _INK[[COLOURS.index(glyph.colour) for glyph in glyphs]]
    inks = inks + rng.uniform(-18, 18, inks.shape).astype(np.float32)
    for number, glyph in enumerate(glyphs):
        left, top = round(glyph.x - BOX / 2), round(glyph.y - BOX / 2)
        rows = slice(max(top, 0), min(top + BOX, PICTURE))
        columns = slice(max(left, 0), min(left + BOX, PICTURE))
        part = opacity[number, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
        canvas[rows, columns] += (inks[number] - canvas[rows, columns]) * part[..., None]
        owner[rows, columns][part > 0.4] = number + 1
    noise = rng.integers(-6, 7, (PICTURE, PICTURE, 1), dtype=np.int8)
    return Picture(np.clip(canvas + noise, 0, 255).astype(np.uint8), glyphs, owner)
