"""Letters in the typefaces that matplotlib ships, in two splits, and shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kvprune.demo.strokes import FINE, Floats, Split, check_split

__all__ = ["TYPEFACES", "letter_strokes", "shape_strokes"]

TYPEFACES: dict[Split, tuple[str, ...]] = {
    "train": ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono-Bold", "DejaVuSerif", "cmss10", "cmtt10"),
    "held-out": ("DejaVuSansMono", "DejaVuSerif-Bold"),
}
"""Typefaces of each split, among the files that matplotlib ships."""

_LARGE = 8 * FINE  # drawings are made this large and then reduced, so that their edges are smooth


def letter_strokes(letters: Sequence[str], split: Split) -> list[Floats]:
    """Return the ink of letters in the typefaces of a split: for each letter float32 [N, 32, 32] in 0..1.

    Raises:
        ValueError: If `split` is unknown.
        ImportError: If matplotlib is not installed.
    """
    check_split(split)
    folder = _folder()
    fonts = [ImageFont.truetype(str(folder / f"{name}.ttf"), _LARGE) for name in TYPEFACES[split]]
    return [np.stack([_letter(letter, font) for font in fonts]) for letter in letters]


def shape_strokes(shapes: Sequence[str]) -> list[Floats]:
    """Return the ink of filled shapes, for each name float32 [1, 32, 32] in 0..1.

    Raises:
        KeyError: If there is no shape of a name.
    """
    made = []
    for shape in shapes:
        sheet = Image.new("L", (_LARGE, _LARGE))
        points = [((0.5 + x / 2) * _LARGE, (0.5 + y / 2) * _LARGE) for x, y in _OUTLINES[shape]]
        ImageDraw.Draw(sheet).polygon(points, fill=255)
        made.append(_reduce(sheet)[None])
    return made


def _folder() -> Path:
    try:
        from matplotlib import get_data_path
    except ImportError as error:
        raise ImportError('the letters of the demo need matplotlib: pip install "kvprune[demo]"') from error
    return Path(get_data_path()) / "fonts" / "ttf"


def _letter(letter: str, font: ImageFont.FreeTypeFont) -> Floats:
    """Draw a letter as tall as a drawing; letters that would be wider than it are made narrower."""
    left, top, right, bottom = (int(edge) for edge in font.getbbox(letter))
    sheet = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(sheet).text((-left, -top), letter, fill=255, font=font)
    room = 0.94 * _LARGE
    letter_size = (round(min(room, room / sheet.height * sheet.width)), round(room))
    square = Image.new("L", (_LARGE, _LARGE))
    place = ((_LARGE - letter_size[0]) // 2, (_LARGE - letter_size[1]) // 2)
    square.paste(sheet.resize(letter_size, Image.Resampling.BICUBIC), place)
    return _reduce(square)


def _reduce(sheet: Image.Image) -> Floats:
    small = sheet.resize((FINE, FINE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255.0


def _round(points: int, radius: float = 0.9) -> list[tuple[float, float]]:
    """Return the corners of a regular polygon, the first one on top."""
    angles = [2 * math.pi * number / points for number in range(points)]
    return [(radius * math.sin(angle), -radius * math.cos(angle)) for angle in angles]


def _star() -> list[tuple[float, float]]:
    outer, inner = _round(5, 1.0), _round(10, 0.42)[1::2]
    return [point for pair in zip(outer, inner, strict=True) for point in pair]


def _heart() -> list[tuple[float, float]]:
    angles = [2 * math.pi * number / 60 for number in range(60)]
    across = [16 * math.sin(angle) ** 3 for angle in angles]
    up = [
        13 * math.cos(angle) - 5 * math.cos(2 * angle) - 2 * math.cos(3 * angle) - math.cos(4 * angle)
        for angle in angles
    ]
    return [(x / 18, -(y + 2) / 18) for x, y in zip(across, up, strict=True)]


_ARM = 0.3
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": _round(60),
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "triangle": [(0.0, -0.95), (0.95, 0.8), (-0.95, 0.8)],
    "star": _star(),
    "cross": [
        *((-_ARM, -0.95), (_ARM, -0.95), (_ARM, -_ARM), (0.95, -_ARM), (0.95, _ARM), (_ARM, _ARM)),
        *((_ARM, 0.95), (-_ARM, 0.95), (-_ARM, _ARM), (-0.95, _ARM), (-0.95, -_ARM), (-_ARM, -_ARM)),
    ],
    "heart": _heart(),
}
