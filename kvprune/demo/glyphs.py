"""The glyphs of the demo's pictures: their names and kinds, and a bank of drawings to paint them from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from kvprune.demo.handwriting import digit_strokes
from kvprune.demo.strokes import FINE, Floats, Split, check_split
from kvprune.demo.typefaces import letter_strokes, shape_strokes

__all__ = ["BOX", "DIGITS", "GLYPHS", "KINDS", "LETTERS", "SHAPES", "Drawings", "drawings", "kind_of"]

DIGITS = tuple("0123456789")
LETTERS = tuple("CEHKLMPRTUXY")  # none looks like a digit, and none is a word such as "a"
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")

KINDS = {"digit": DIGITS, "letter": LETTERS, "shape": SHAPES}
"""Names of the glyphs of each kind."""

GLYPHS = (*DIGITS, *LETTERS, *SHAPES)
"""Names of all glyphs; each is one token."""

BOX = 26
"""Side in pixels of the square that a glyph is drawn in; glyphs are up to 22 pixels tall before slanting."""


def kind_of(glyph: str) -> str:
    """Return the kind of a glyph, one of `KINDS`."""
    return next(kind for kind, names in KINDS.items() if glyph in names)


@dataclass(frozen=True)
class Drawings:
    """Drawings of all glyphs of one split.

    Attributes:
        strokes: ink of each drawing, float32 [N, 32, 32] in 0..1.
        sources: for each glyph of `GLYPHS`, the rows of `strokes` that show it, int64.
    """

    strokes: Floats
    sources: tuple[NDArray[np.int64], ...]

    def pick(self, rng: np.random.Generator, glyphs: NDArray[np.int64]) -> NDArray[np.int64]:
        """Draw a drawing for each glyph.

        Args:
            rng: Source of all randomness.
            glyphs: Indices into `GLYPHS`, int64 [N].

        Returns:
            Rows of `strokes`, int64 [N].
        """
        rows = [self.sources[glyph][int(rng.integers(len(self.sources[glyph])))] for glyph in glyphs]
        return np.array(rows, dtype=np.int64)

    def write(self, rng: np.random.Generator, source: NDArray[np.int64], sizes: NDArray[np.int64]) -> Floats:
        """Draw glyphs with random slant, width, thickness and strength.

        Args:
            rng: Source of all randomness.
            source: Rows of `strokes` to draw, int64 [N].
            sizes: Height of each glyph in pixels, int64 [N].

        Returns:
            Opacity of the ink, float32 [N, BOX, BOX] in 0..1, each glyph centred in its box.
        """
        count = len(source)
        angle = rng.uniform(-0.12, 0.12, count)
        shear = rng.uniform(-0.1, 0.1, count)
        stretch = rng.uniform(0.94, 1.1, count)
        shift = rng.uniform(-0.6, 0.6, (2, count))
        # [N, 2, 2]: maps a pixel (x, y) of the box to a pixel (column, row) of the enlarged original.
        scale = FINE / sizes
        matrix = np.empty((count, 2, 2))
        matrix[:, 0, 0] = np.cos(angle) * scale / stretch
        matrix[:, 0, 1] = (np.sin(angle) + shear) * scale / stretch
        matrix[:, 1, 0] = -np.sin(angle) * scale
        matrix[:, 1, 1] = np.cos(angle) * scale
        axis = np.arange(BOX) - (BOX - 1) / 2
        x = axis[None, None, :] - shift[0][:, None, None]
        y = axis[None, :, None] - shift[1][:, None, None]
        column = matrix[:, 0, 0, None, None] * x + matrix[:, 0, 1, None, None] * y + (FINE - 1) / 2
        row = matrix[:, 1, 0, None, None] * x + matrix[:, 1, 1, None, None] * y + (FINE - 1) / 2
        ink = _sample(self.strokes, source, row.astype(np.float32), column.astype(np.float32))
        threshold = rng.uniform(0.32, 0.46, count).astype(np.float32)[:, None, None]
        softness = rng.uniform(0.2, 0.4, count).astype(np.float32)[:, None, None]
        strength = rng.uniform(0.85, 1.0, count).astype(np.float32)[:, None, None]
        opacity: Floats = np.clip((ink - threshold) / softness, 0.0, 1.0) * strength
        return opacity


@cache
def drawings(split: Split) -> Drawings:
    """Return the drawings of one split, the same at every call.

    Each split has handwritten digits of its own and letters in typefaces of its own. Shapes are the same in
    both, and only `Drawings.write` varies them.

    Args:
        split: "train" or "held-out".

    Raises:
        ValueError: If `split` is neither.
        ImportError: If scikit-learn or matplotlib is not installed.
    """
    check_split(split)
    groups = [
        *digit_strokes(split),
        *letter_strokes(LETTERS, split),
        *shape_strokes(SHAPES),
    ]
    ends = np.cumsum([len(group) for group in groups])
    sources = tuple(np.arange(end - len(group), end) for group, end in zip(groups, ends, strict=True))
    return Drawings(np.concatenate(groups), sources)


def _sample(strokes: Floats, source: NDArray[np.int64], row: Floats, column: Floats) -> Floats:
    """Sample `strokes[source]` bilinearly at fractional positions [N, BOX, BOX]; outside there is no ink."""
    inside = (row > 0) & (row < FINE - 1) & (column > 0) & (column < FINE - 1)
    row = np.clip(row, 0, FINE - 1.001)
    column = np.clip(column, 0, FINE - 1.001)
    top, left = row.astype(np.int64), column.astype(np.int64)
    down, right = row - top, column - left
    flat = strokes.reshape(-1)
    corner = source[:, None, None] * (FINE * FINE) + top * FINE + left
    upper = flat[corner] * (1 - right) + flat[corner + 1] * right
    lower = flat[corner + FINE] * (1 - right) + flat[corner + FINE + 1] * right
    ink: Floats = (upper * (1 - down) + lower * down) * inside
    return ink
