"""What lies behind the glyphs: regions of photographs, and textures."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kvprune.demo.strokes import Floats, Split, check_split

__all__ = ["ground", "photographs"]

_CONTRAST = 0.55  # photographs keep this share of their contrast, so that glyphs stay legible
_MEAN = 112.0  # brightness of a medium grey afterwards: darker, so that white glyphs stand out
_PHOTOGRAPHS = 0.7  # share of pictures whose ground is a photograph
_TRAIN_COLUMNS = 400  # photographs are 640 pixels wide; columns from here on are held out
_OCTAVES = (3, 7, 15, 31, 63)  # sides of the random grids that textures are made of


@cache
def photographs(split: Split) -> tuple[NDArray[np.uint8], ...]:
    """Return the part of scikit-learn's two sample photographs that belongs to a split, uint8 [427, W, 3].

    Raises:
        ValueError: If `split` is unknown.
        ImportError: If scikit-learn is not installed.
    """
    check_split(split)
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise ImportError(
            'the pictures of the demo need scikit-learn: pip install "kvprune[demo]"'
        ) from error
    columns = slice(_TRAIN_COLUMNS) if split == "train" else slice(_TRAIN_COLUMNS, None)
    return tuple(np.ascontiguousarray(image[:, columns]) for image in load_sample_images().images)


def ground(rng: np.random.Generator, side: int, split: Split) -> Floats:
    """Draw a ground of `side` x `side` pixels: float32 [side, side, 3] in 0..255.

    It is a region of a photograph, flipped at random, or a texture of random tint and grain.
    """
    made = _region(rng, side, split) if rng.random() < _PHOTOGRAPHS else _texture(rng, side)
    return _MEAN + _CONTRAST * (made - 128.0) + rng.uniform(-12, 12)


def _region(rng: np.random.Generator, side: int, split: Split) -> Floats:
    pictures = photographs(split)
    picture = pictures[int(rng.integers(len(pictures)))]
    top = int(rng.integers(picture.shape[0] - side + 1))
    left = int(rng.integers(picture.shape[1] - side + 1))
    region = picture[top : top + side, left : left + side]
    if rng.random() < 0.5:
        region = region[:, ::-1]
    return region.astype(np.float32)


def _texture(rng: np.random.Generator, side: int) -> Floats:
    steepness = rng.uniform(0.4, 1.1)  # how fast finer grains become weaker
    total = np.zeros((side, side), dtype=np.float32)
    for octave in _OCTAVES:
        grain = Image.fromarray(rng.standard_normal((octave, octave)).astype(np.float32))
        size = (side, side)
        total += (octave / _OCTAVES[0]) ** -steepness * np.asarray(
            grain.resize(size, Image.Resampling.BICUBIC)
        )
    total /= total.std() + 1e-6
    dark, light = (grey + rng.uniform(-45, 45, 3).astype(np.float32) for grey in rng.uniform(30, 225, 2))
    share = 1.0 / (1.0 + np.exp(-1.7 * total[..., None]))
    return np.asarray(dark + share * (light - dark), dtype=np.float32)
