"""Handwritten digits in two splits, training and held-out, and random variations of each digit.

The digits are scikit-learn's `load_digits`: 1797 grey pictures of 8 x 8 pixels. A picture of the demo shows
digits of one split only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "held-out"]
Floats = NDArray[np.float32]

BOX = 26
"""Side in pixels of the square that a digit is drawn in; digits are up to 22 pixels tall before slanting."""

_FINE = 32  # side of the enlarged originals in pixels
_HELD_OUT_SHARE = 0.2
_AGREEING_NEIGHBOURS = 4
_SPLIT_SEED = 20250


@dataclass(frozen=True)
class Handwriting:
    """The digits of one split.

    Attributes:
        strokes: ink of each digit, float32 [N, 32, 32] in 0..1.
        by_value: for each digit value 0..9, the rows of `strokes` that show it, int64.
        indices: rows of `load_digits` that the digits come from, int64 [N].
    """

    strokes: Floats
    by_value: tuple[NDArray[np.int64], ...]
    indices: NDArray[np.int64]

    def pick(self, rng: np.random.Generator, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Draw a digit for each value.

        Args:
            rng: Source of all randomness.
            values: Digit values 0..9, int64 [N].

        Returns:
            Rows of `strokes`, int64 [N].
        """
        rows = [self.by_value[value][int(rng.integers(len(self.by_value[value])))] for value in values]
        return np.array(rows, dtype=np.int64)

    def write(self, rng: np.random.Generator, source: NDArray[np.int64], sizes: NDArray[np.int64]) -> Floats:
        """Draw digits with random slant, width, thickness and strength.

        Args:
            rng: Source of all randomness.
            source: Rows of `strokes` to draw, int64 [N].
            sizes: Height of each digit in pixels, int64 [N].

        Returns:
            Opacity of the ink, float32 [N, BOX, BOX] in 0..1, each digit centred in its box.
        """
        count = len(source)
        angle = rng.uniform(-0.12, 0.12, count)
        shear = rng.uniform(-0.1, 0.1, count)
        stretch = rng.uniform(0.94, 1.1, count)
        shift = rng.uniform(-0.6, 0.6, (2, count))
        # [N, 2, 2]: maps a pixel (x, y) of the box to a pixel (column, row) of the enlarged original.
        scale = _FINE / sizes
        matrix = np.empty((count, 2, 2))
        matrix[:, 0, 0] = np.cos(angle) * scale / stretch
        matrix[:, 0, 1] = (np.sin(angle) + shear) * scale / stretch
        matrix[:, 1, 0] = -np.sin(angle) * scale
        matrix[:, 1, 1] = np.cos(angle) * scale
        axis = np.arange(BOX) - (BOX - 1) / 2
        x = axis[None, None, :] - shift[0][:, None, None]
        y = axis[None, :, None] - shift[1][:, None, None]
        column = matrix[:, 0, 0, None, None] * x + matrix[:, 0, 1, None, None] * y + (_FINE - 1) / 2
        row = matrix[:, 1, 0, None, None] * x + matrix[:, 1, 1, None, None] * y + (_FINE - 1) / 2
        ink = _sample(self.strokes, source, row.astype(np.float32), column.astype(np.float32))
        threshold = rng.uniform(0.32, 0.46, count).astype(np.float32)[:, None, None]
        softness = rng.uniform(0.2, 0.4, count).astype(np.float32)[:, None, None]
        strength = rng.uniform(0.8, 1.0, count).astype(np.float32)[:, None, None]
        opacity: Floats = np.clip((ink - threshold) / softness, 0.0, 1.0) * strength
        return opacity


@cache
def handwriting(split: Split) -> Handwriting:
    """Return the digits of one split; the same at every call and on every machine.

    Only digits that are easy to read are used: those whose four nearest neighbours among all 1797, by
    distance of pixels, show the same value. This drops about one in twenty-five. The rest is split at random
    within each value.

    Args:
        split: "train" (80 %) or "held-out" (20 %).

    Raises:
        ValueError: If `split` is neither.
        ImportError: If scikit-learn is not installed.
    """
    if split not in ("train", "held-out"):
        raise ValueError(f"split must be 'train' or 'held-out', not {split!r}")
    pixels, labels = _load()
    rng = np.random.default_rng(_SPLIT_SEED)
    legible = _legible(pixels, labels)
    chosen: list[NDArray[np.int64]] = []
    for value in range(10):
        rows = rng.permutation(np.flatnonzero(legible & (labels == value)))
        held_out = round(len(rows) * _HELD_OUT_SHARE)
        chosen.append(np.sort(rows[:held_out] if split == "held-out" else rows[held_out:]))
    indices = np.concatenate(chosen)
    ends = np.cumsum([len(rows) for rows in chosen])
    by_value = tuple(np.arange(end - len(rows), end) for rows, end in zip(chosen, ends, strict=True))
    return Handwriting(_enlarge(pixels[indices]), by_value, indices)


def _load() -> tuple[Floats, NDArray[np.int64]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            'the pictures of the demo need scikit-learn: pip install "kvprune[demo]"'
        ) from error
    data = load_digits()
    pixels = np.asarray(data.images, dtype=np.float32) / 16.0
    return pixels, np.asarray(data.target, dtype=np.int64)


def _legible(pixels: Floats, labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which digits [N] are easy to read, from pixels [N, 8, 8] and labels [N]; see `handwriting`."""
    flat = pixels.reshape(len(pixels), -1).astype(np.float64)
    squares = (flat**2).sum(1)
    distances = squares[:, None] + squares[None, :] - 2.0 * flat @ flat.T
    np.fill_diagonal(distances, np.inf)
    nearest = np.argpartition(distances, _AGREEING_NEIGHBOURS, axis=1)[:, :_AGREEING_NEIGHBOURS]
    agree: NDArray[np.bool_] = (labels[nearest] == labels[:, None]).all(1)
    return agree


def _enlarge(pixels: Floats) -> Floats:
    """Enlarge digits [N, 8, 8] to [N, 32, 32], smoothly."""
    from PIL import Image

    size = (_FINE, _FINE)
    large = [np.asarray(Image.fromarray(digit).resize(size, Image.Resampling.BICUBIC)) for digit in pixels]
    enlarged: Floats = np.clip(np.stack(large), 0.0, 1.0).astype(np.float32)
    return enlarged


def _sample(strokes: Floats, source: NDArray[np.int64], row: Floats, column: Floats) -> Floats:
    """Sample `strokes[source]` bilinearly at fractional positions [N, BOX, BOX]; outside there is no ink."""
    inside = (row > 0) & (row < _FINE - 1) & (column > 0) & (column < _FINE - 1)
    row = np.clip(row, 0, _FINE - 1.001)
    column = np.clip(column, 0, _FINE - 1.001)
    top, left = row.astype(np.int64), column.astype(np.int64)
    down, right = row - top, column - left
    flat = strokes.reshape(-1)
    corner = source[:, None, None] * (_FINE * _FINE) + top * _FINE + left
    upper = flat[corner] * (1 - right) + flat[corner + 1] * right
    lower = flat[corner + _FINE] * (1 - right) + flat[corner + _FINE + 1] * right
    ink: Floats = (upper * (1 - down) + lower * down) * inside
    return ink
