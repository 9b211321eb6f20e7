"""Tiles of training pictures, cut as the processor cuts them, and labels of what each patch shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvprune.demo.architecture import MAX_TILES, PATCH, TILINGS
from kvprune.demo.handwriting import Handwriting
from kvprune.demo.pictures import COLOURS, SHAPES, TILE, NoRoomError, Picture, paint, place

SIDE = TILE // PATCH
"""Number of patches along the side of a tile."""

NOT_SCORED = -100
"""Label of a patch that losses ignore."""

_LEAST_INK = 16  # a patch with some ink, but fewer pixels of it, is too ambiguous to be labelled


@dataclass(frozen=True)
class Tiles:
    """Pictures as `MllamaProcessor` would return them.

    Attributes:
        pixel_values: float32 [B, 1, 4, 3, 112, 112].
        aspect_ratio_ids: int64 [B, 1].
        aspect_ratio_mask: int64 [B, 1, 4], 1 for tiles that a picture has.
    """

    pixel_values: torch.Tensor
    aspect_ratio_ids: torch.Tensor
    aspect_ratio_mask: torch.Tensor


@dataclass(frozen=True)
class PatchLabels:
    """What each patch shows, all int64 [B, 4, 64]; `NOT_SCORED` outside the picture and where it is unclear.

    Attributes:
        value: value of the digit, 0..9; 10 where there is no digit.
        colour: index of the digit's colour in `COLOURS`; `len(COLOURS)` where there is no digit.
        centre: 1 where a digit's centre lies in the patch, else 0.
        column: column of the patch in the picture, 0..15 from left to right.
        rank: how many digits of the same colour are further left, 0..5; only where there is a digit.
    """

    value: torch.Tensor
    colour: torch.Tensor
    centre: torch.Tensor
    column: torch.Tensor
    rank: torch.Tensor


def shape_of(picture: Picture) -> tuple[int, int]:
    """Return how many tiles a picture has, down and across."""
    height, width = picture.pixels.shape[:2]
    return -(-height // TILE), -(-width // TILE)


def to_tiles(pictures: Sequence[Picture]) -> Tiles:
    """Cut pictures into tiles exactly as the processor does.

    Raises:
        ValueError: If a picture is smaller than a tile both ways; the processor would enlarge it.
    """
    pixels = np.zeros((len(pictures), 1, MAX_TILES, 3, TILE, TILE), dtype=np.float32)
    mask = np.zeros((len(pictures), 1, MAX_TILES), dtype=np.int64)
    ids = np.zeros((len(pictures), 1), dtype=np.int64)
    for number, picture in enumerate(pictures):
        height, width = picture.pixels.shape[:2]
        if height < TILE and width < TILE:
            raise ValueError(f"the processor would enlarge a picture of {width} x {height} pixels")
        shape = shape_of(picture)
        tiles = _cut(picture.pixels, shape).transpose(0, 3, 1, 2)
        pixels[number, 0, : len(tiles)] = (tiles.astype(np.float32) / 255.0 - 0.5) / 0.5
        mask[number, 0, : len(tiles)] = 1
        ids[number, 0] = TILINGS.index(shape) + 1
    return Tiles(torch.from_numpy(pixels), torch.from_numpy(ids), torch.from_numpy(mask))


def label_patches(pictures: Sequence[Picture]) -> PatchLabels:
    """Return what each patch of each picture shows."""
    labels = np.full((5, len(pictures), MAX_TILES, SIDE * SIDE), NOT_SCORED, dtype=np.int64)
    for number, picture in enumerate(pictures):
        down, across = shape_of(picture)
        used = down * across
        owner = _cut(picture.owner[..., None], (down, across))[..., 0]
        # [tiles, TILE, TILE] to [patches, pixels of a patch]
        patches = owner.reshape(used, SIDE, PATCH, SIDE, PATCH).swapaxes(2, 3).reshape(used * SIDE * SIDE, -1)
        digits = len(picture.digits)
        offset = np.arange(len(patches))[:, None] * (digits + 1)
        ink = np.bincount((patches + offset).ravel(), minlength=len(patches) * (digits + 1))
        ink = ink.reshape(len(patches), digits + 1)[:, 1:]  # [patches, digits], pixels of each digit's ink
        most, winner = ink.max(1), ink.argmax(1)
        values = np.array([digit.value for digit in picture.digits])
        colours = np.array([COLOURS.index(digit.colour) for digit in picture.digits])
        unclear = (most > 0) & (most < _LEAST_INK)
        value = np.where(most > 0, values[winner], 10)
        colour = np.where(most > 0, colours[winner], len(COLOURS))
        value[unclear] = colour[unclear] = NOT_SCORED
        grid = np.zeros((down * SIDE, across * SIDE, 1), dtype=np.int64)
        for digit in picture.digits:
            grid[int(digit.y) // PATCH, int(digit.x) // PATCH] = 1
        column = np.broadcast_to(np.arange(across * SIDE)[None, :, None], grid.shape)
        centre, place_ = (_cut(part, (down, across), SIDE) for part in (grid, column))
        rank = np.where((most > 0) & ~unclear, _ranks(picture)[winner], NOT_SCORED)
        for kind, part in enumerate((value, colour, centre, place_, rank)):
            labels[kind, number, :used] = part.reshape(used, -1)
    return PatchLabels(*(torch.from_numpy(part) for part in labels))


def _ranks(picture: Picture) -> NDArray[np.int64]:
    """Return for each digit how many of its colour are further left, int64 [digits].

    A colour with more than six digits, or with two that lie almost one above the other, is `NOT_SCORED`.
    """
    ranks = np.full(len(picture.digits), NOT_SCORED, dtype=np.int64)
    for colour in COLOURS:
        alike = [(digit.x, number) for number, digit in enumerate(picture.digits) if digit.colour == colour]
        alike.sort()
        gaps = [right[0] - left[0] for left, right in pairwise(alike)]
        if len(alike) <= 6 and min(gaps, default=PATCH) > PATCH / 2:
            ranks[[number for _, number in alike]] = np.arange(len(alike))
    return ranks


def crowd(rng: np.random.Generator, hand: Handwriting, shape: tuple[int, int] | None = None) -> Picture:
    """Make a picture full of digits in random colours, for the stage in which the vision tower learns to see.

    Args:
        rng: Source of all randomness.
        hand: Handwriting to use.
        shape: Tiles down and across; drawn from `SHAPES` where None.
    """
    down, across = shape if shape is not None else SHAPES[int(rng.integers(len(SHAPES)))]
    colours = [str(name) for name in rng.choice(COLOURS, int(rng.integers(5, 10)) * down * across)]
    while True:
        try:
            digits = place(rng, down * TILE, across * TILE, colours)
            return paint(rng, down * TILE, across * TILE, digits, hand)
        except NoRoomError:
            colours.pop()


def _cut(pixels: NDArray[Any], shape: tuple[int, int], side: int = TILE) -> NDArray[Any]:
    """Cut [H, W, C] into [tiles, side, side, C], padded with zeros at the bottom and on the right."""
    down, across = shape
    missing = ((0, down * side - pixels.shape[0]), (0, across * side - pixels.shape[1]), (0, 0))
    tiles = np.pad(pixels, missing).reshape(down, side, across, side, -1).swapaxes(1, 2)
    return tiles.reshape(down * across, side, side, -1)
