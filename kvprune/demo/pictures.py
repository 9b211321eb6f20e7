"""Pictures of coloured handwritten digits on uneven paper, among clutter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from kvprune.demo.handwriting import BOX, Handwriting

TILE = 112
"""Side of a tile in pixels."""

COLOURS = ("red", "green", "blue", "orange", "purple")
"""Colours that digits have and questions name. Nothing else in a picture has one of these colours."""

SHAPES = ((1, 1), (1, 2), (2, 1), (2, 2))
"""Tiles (down, across) that pictures have: one, two beside each other, two above each other, or four."""

ROW_GAP = 12.0
"""Least horizontal distance in pixels between the centres of digits that are read from left to right."""

_INK = np.array(
    [[205, 30, 35], [25, 140, 45], [35, 65, 205], [235, 130, 15], [130, 35, 155]], dtype=np.float32
)
_SIZES = (17, 21)  # least and largest height of a digit in pixels
_MARGIN = 12
_HALF_PATCH = 7


class NoRoomError(RuntimeError):
    """The requested digits do not fit in the picture."""


@dataclass(frozen=True)
class Digit:
    """One digit of a picture.

    Attributes:
        value: its value, 0..9.
        colour: name of its colour, one of `COLOURS`.
        x: horizontal position of its centre in pixels.
        y: vertical position of its centre in pixels.
        size: its height in pixels.
    """

    value: int
    colour: str
    x: float
    y: float
    size: int


@dataclass(frozen=True)
class Picture:
    """A picture and its digits.

    Attributes:
        pixels: uint8 [H, W, 3].
        digits: all digits of the picture.
        owner: which digit's ink covers a pixel, int16 [H, W]: 1 + its index in `digits`; 0 without ink.
    """

    pixels: NDArray[np.uint8]
    digits: tuple[Digit, ...]
    owner: NDArray[np.int16]

    def image(self) -> Image.Image:
        """Return the picture as a PIL image in mode RGB."""
        return Image.fromarray(self.pixels)


def random_size(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[int, int]:
    """Draw height and width in pixels of a picture of `shape` tiles; one in six is up to 15 pixels smaller.

    One side of a one-tile picture is always a whole tile, so that the processor never enlarges a picture.
    """
    height, width = shape[0] * TILE, shape[1] * TILE
    if rng.random() < 1 / 6:
        less = rng.integers(0, 16, 2)
        if shape == (1, 1):
            less[int(rng.integers(2))] = 0
        height, width = height - int(less[0]), width - int(less[1])
    return height, width


def place(
    rng: np.random.Generator,
    height: int,
    width: int,
    colours: Sequence[str],
    in_a_row: str | None = None,
) -> tuple[Digit, ...]:
    """Draw values, sizes and places of digits; no two digits overlap.

    Centres lie on a grid of half patches, moved by up to one pixel, so that digits cover several patches.

    Args:
        rng: Source of all randomness.
        height: Height of the picture in pixels.
        width: Width of the picture in pixels.
        colours: Names of colours, one for each digit.
        in_a_row: The colour whose digits keep a horizontal distance of `ROW_GAP`; None for no colour.

    Raises:
        NoRoomError: If the digits do not fit, after many attempts.
    """
    for _ in range(40):
        placed = _try_to_place(rng, height, width, colours, in_a_row)
        if placed is not None:
            return placed
    raise NoRoomError(f"{len(colours)} digits do not fit in a picture of {width} x {height} pixels")


def paint(
    rng: np.random.Generator, height: int, width: int, digits: tuple[Digit, ...], hand: Handwriting
) -> Picture:
    """Paint paper, then clutter, then the digits."""
    canvas = _paper(rng, height, width, digits)
    owner = np.zeros((height, width), dtype=np.int16)
    values = np.array([digit.value for digit in digits], dtype=np.int64)
    sizes = np.array([digit.size for digit in digits], dtype=np.int64)
    opacity = hand.write(rng, hand.pick(rng, values), sizes)
    for number, digit in enumerate(digits):
        ink = _INK[COLOURS.index(digit.colour)] + rng.uniform(-22, 22, 3).astype(np.float32)
        left, top = round(digit.x - BOX / 2), round(digit.y - BOX / 2)
        rows = slice(max(top, 0), min(top + BOX, height))
        columns = slice(max(left, 0), min(left + BOX, width))
        part = opacity[number, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
        canvas[rows, columns] += (ink - canvas[rows, columns]) * part[..., None]
        owner[rows, columns][part > 0.4] = number + 1
    noise = rng.integers(-7, 8, (height, width, 1), dtype=np.int8)
    return Picture(np.clip(canvas + noise, 0, 255).astype(np.uint8), digits, owner)


def _try_to_place(
    rng: np.random.Generator, height: int, width: int, colours: Sequence[str], in_a_row: str | None
) -> tuple[Digit, ...] | None:
    """Make one attempt to place the digits; see `place`. Return None if it fails."""
    sizes = rng.integers(_SIZES[0], _SIZES[1] + 1, len(colours))
    members = [number for number, colour in enumerate(colours) if colour == in_a_row]
    columns = _apart(rng, _places(width), len(members))
    if columns is None:
        return None
    fixed = dict(zip(members, rng.permutation(columns).tolist(), strict=True))
    placed: list[tuple[int, float, float, int]] = []
    for number in members + [n for n in range(len(colours)) if n not in fixed]:
        size = int(sizes[number])
        for _ in range(60):
            column = fixed[number] if number in fixed else int(rng.choice(_places(width)))
            x, y = (float(place + rng.integers(-1, 2)) for place in (column, rng.choice(_places(height))))
            if all(max(abs(x - u), abs(y - v)) >= 0.5 * (size + other) for _, u, v, other in placed):
                placed.append((number, x, y, size))
                break
        else:
            return None
    values = rng.integers(0, 10, len(colours))
    return tuple(Digit(int(values[n]), colours[n], x, y, size) for n, x, y, size in sorted(placed))


def _places(length: int) -> NDArray[np.int64]:
    """Return where centres may lie along a side of `length` pixels: at every half patch."""
    return np.arange(2 * _HALF_PATCH, length - _MARGIN, _HALF_PATCH)


def _apart(rng: np.random.Generator, places: NDArray[np.int64], count: int) -> NDArray[np.int64] | None:
    """Draw `count` of `places`, no two of them neighbours; None where there are too few places."""
    spare = len(places) - max(count - 1, 0)
    if spare < count:
        return None
    chosen: NDArray[np.int64] = places[np.sort(rng.choice(spare, count, replace=False)) + np.arange(count)]
    return chosen


def _paper(rng: np.random.Generator, height: int, width: int, digits: Sequence[Digit]) -> NDArray[np.float32]:
    """Paint light paper, unevenly lit, with clutter: float32 [H, W, 3].

    Nothing on it has a digit's colour, and no scribble is on a digit.
    """
    base = rng.uniform(205, 250) + rng.uniform(-10, 10, 3)
    waves = np.clip(base + rng.uniform(-16, 16, (3, 3, 3)), 0, 255).astype(np.uint8)
    sheet = Image.fromarray(waves).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(sheet)
    tiles = height * width / TILE**2
    for _ in range(rng.poisson(1.5 * tiles)):
        _blot(rng, draw, height, width)
    for _ in range(rng.poisson(1.5 * tiles)):
        _stroke(rng, draw, height, width)
    for _ in range(rng.poisson(3.0 * tiles)):
        middle = rng.uniform((0, 0), (width, height))
        if all(max(abs(middle[0] - digit.x), abs(middle[1] - digit.y)) > 16 for digit in digits):
            _scribble(rng, draw, middle)
    return np.array(sheet, dtype=np.float32)


def _dull(rng: np.random.Generator, low: int, high: int) -> tuple[int, int, int]:
    """Draw a grey, teal or pink between two brightnesses."""
    grey = rng.uniform(low, high)
    tint = np.array([(0.0, 0.0, 0.0), (-45.0, 15.0, 15.0), (35.0, -25.0, 0.0)][int(rng.integers(3))])
    red, green, blue = np.clip(grey + tint * grey / 200 + rng.uniform(-8, 8, 3), 0, 255).astype(int)
    return int(red), int(green), int(blue)


def _blot(rng: np.random.Generator, draw: ImageDraw.ImageDraw, height: int, width: int) -> None:
    x, y = rng.uniform(0, width), rng.uniform(0, height)
    across, down = rng.uniform(4, 14, 2)
    draw.ellipse((x - across, y - down, x + across, y + down), fill=_dull(rng, 165, 235))


def _stroke(rng: np.random.Generator, draw: ImageDraw.ImageDraw, height: int, width: int) -> None:
    start = rng.uniform((0, 0), (width, height))
    bend, end = start + rng.uniform(-40, 40, 2), start + rng.uniform(-70, 70, 2)
    steps = np.linspace(0, 1, 9)[:, None]
    curve = (1 - steps) ** 2 * start + 2 * steps * (1 - steps) * bend + steps**2 * end
    draw.line(
        [(float(x), float(y)) for x, y in curve], fill=_dull(rng, 90, 200), width=int(rng.integers(1, 3))
    )


def _scribble(rng: np.random.Generator, draw: ImageDraw.ImageDraw, middle: NDArray[np.float64]) -> None:
    points = middle + rng.uniform(-8, 8, (int(rng.integers(3, 6)), 2))
    draw.line(
        [(float(x), float(y)) for x, y in points], fill=_dull(rng, 30, 130), width=int(rng.integers(1, 4))
    )
