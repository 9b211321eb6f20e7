"""Tiles of training pictures, cut as the processor cuts them, and labels of what each patch shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvprune.demo.architecture import MAX_TILES, PATCH, TILINGS
from kvprune.demo.glyphs import GLYPHS
from kvprune.demo.pictures import COLOURS, GRID, PICTURE, TILE, Picture

SIDE = TILE // PATCH
"""Number of patches along the side of a tile."""

NOT_SCORED = -100
"""Label of a patch that losses ignore."""

_LEAST_INK = 16  # a patch with some ink, but fewer pixels of it, is too ambiguous to be labelled
_ACROSS = PICTURE // TILE


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
    """What each patch shows, all int64 [B, 4, 64]; `NOT_SCORED` where it is unclear.

    Attributes:
        glyph: index of the glyph in `GLYPHS`; `len(GLYPHS)` where there is none.
        colour: index of the glyph's colour in `COLOURS`; `len(COLOURS)` where there is none.
        row: row of the cell that the patch's centre lies in, 0..5.
        column: column of the cell that the patch's centre lies in, 0..5.
    """

    glyph: torch.Tensor
    colour: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor


def to_tiles(pictures: Sequence[Picture]) -> Tiles:
    """Cut pictures into tiles exactly as the processor does."""
    pixels = np.stack([_cut(picture.pixels) for picture in pictures]).transpose(0, 1, 4, 2, 3)
    values = (torch.from_numpy(np.ascontiguousarray(pixels)).float() / 255.0 - 0.5) / 0.5
    number = TILINGS.index((_ACROSS, _ACROSS)) + 1
    return Tiles(
        values[:, None],
        torch.full((len(pictures), 1), number),
        torch.ones((len(pictures), 1, MAX_TILES), dtype=torch.long),
    )


def label_patches(pictures: Sequence[Picture]) -> PatchLabels:
    """Return what each patch of each picture shows."""
    centres = (np.arange(_ACROSS * SIDE) + 0.5) * PATCH
    cells = (centres * GRID / PICTURE).astype(np.int64)  # [16], cell of each row or column of patches
    whole = np.meshgrid(cells, cells, indexing="ij")  # [16, 16] each, the cell's row and column of each patch
    rows, columns = (_cut(part[..., None], SIDE).reshape(-1) for part in whole)
    glyphs, colours = zip(*(_shown(picture) for picture in pictures), strict=True)
    shape = (len(pictures), MAX_TILES, SIDE * SIDE)
    return PatchLabels(
        *(
            torch.from_numpy(np.array(np.broadcast_to(part, (shape[0], part.shape[-1])))).view(shape)
            for part in (np.stack(glyphs), np.stack(colours), rows, columns)
        )
    )


def _shown(picture: Picture) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the glyph and the colour that each patch of a picture shows, int64 [256]."""
    owner = _cut(picture.owner[..., None])[..., 0]
    # [4, TILE, TILE] to [patches, pixels of a patch]
    patches = owner.reshape(MAX_TILES, SIDE, PATCH, SIDE, PATCH).swapaxes(2, 3).reshape(-1, PATCH * PATCH)
    count = len(picture.glyphs)
    offset = np.arange(len(patches))[:, None] * (count + 1)
    ink = np.bincount((patches + offset).ravel(), minlength=len(patches) * (count + 1))
    ink = ink.reshape(len(patches), count + 1)[:, 1:]  # [patches, glyphs], pixels of each glyph's ink
    most, winner = ink.max(1), ink.argmax(1)
    names = np.array([GLYPHS.index(glyph.name) for glyph in picture.glyphs])
    colours = np.array([COLOURS.index(glyph.colour) for glyph in picture.glyphs])
    name = np.where(most > 0, names[winner], len(GLYPHS))
    colour = np.where(most > 0, colours[winner], len(COLOURS))
    name[(most > 0) & (most < _LEAST_INK)] = colour[(most > 0) & (most < _LEAST_INK)] = NOT_SCORED
    return name, colour


def _cut(pixels: NDArray[Any], side: int = TILE) -> NDArray[Any]:
    """Cut [2 * side, 2 * side, C] into [4, side, side, C]."""
    tiles = pixels.reshape(_ACROSS, side, _ACROSS, side, -1).swapaxes(1, 2)
    return tiles.reshape(MAX_TILES, side, side, -1)
