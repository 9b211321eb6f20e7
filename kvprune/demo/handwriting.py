"""Handwritten digits in two splits, training and held-out.

The digits are scikit-learn's `load_digits`: 1797 grey pictures of 8 x 8 pixels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kvprune.demo.strokes import FINE, Floats, Split, check_split

__all__ = ["digit_rows", "digit_strokes"]

_HELD_OUT_SHARE = 0.2
_AGREEING_NEIGHBOURS = 4
_SPLIT_SEED = 20250


def digit_strokes(split: Split) -> list[Floats]:
    """Return the ink of each digit of a split: for each value 0..9 float32 [N, 32, 32] in 0..1.

    Args:
        split: "train" (80 %) or "held-out" (20 %).

    Raises:
        ValueError: If `split` is neither.
        ImportError: If scikit-learn is not installed.
    """
    pixels, _ = _load()
    return [_enlarge(pixels[rows]) for rows in digit_rows(split)]


def digit_rows(split: Split) -> list[NDArray[np.int64]]:
    """Return the rows of `load_digits` that belong to a split, for each value 0..9.

    Only digits that are easy to read are used: those whose four nearest neighbours among all 1797, by
    distance of pixels, show the same value. This drops about one in twenty-five. The rest is split at random
    within each value.

    Raises:
        ValueError: If `split` is unknown.
        ImportError: If scikit-learn is not installed.
    """
    check_split(split)
    pixels, labels = _load()
    rng = np.random.default_rng(_SPLIT_SEED)
    legible = _legible(pixels, labels)
    chosen: list[NDArray[np.int64]] = []
    for value in range(10):
        rows = rng.permutation(np.flatnonzero(legible & (labels == value)))
        held_out = round(len(rows) * _HELD_OUT_SHARE)
        chosen.append(np.sort(rows[:held_out] if split == "held-out" else rows[held_out:]))
    return chosen


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
    """Return which digits [N] are easy to read, from pixels [N, 8, 8] and labels [N]; see `digit_rows`."""
    flat = pixels.reshape(len(pixels), -1).astype(np.float64)
    squares = (flat**2).sum(1)
    distances = squares[:, None] + squares[None, :] - 2.0 * flat @ flat.T
    np.fill_diagonal(distances, np.inf)
    nearest = np.argpartition(distances, _AGREEING_NEIGHBOURS, axis=1)[:, :_AGREEING_NEIGHBOURS]
    agree: NDArray[np.bool_] = (labels[nearest] == labels[:, None]).all(1)
    return agree


def _enlarge(pixels: Floats) -> Floats:
    """Enlarge digits [N, 8, 8] to [N, 32, 32], smoothly."""
    size = (FINE, FINE)
    large = [np.asarray(Image.fromarray(digit).resize(size, Image.Resampling.BICUBIC)) for digit in pixels]
    enlarged: Floats = np.clip(np.stack(large), 0.0, 1.0).astype(np.float32)
    return enlarged
