"""Pools scores over neighbouring tokens, so that policies keep regions and not scattered tokens.

Neighbours belong to the same image, and only counted columns are neighbours: at a border, the mean is over
fewer tokens and is not lowered by zeros, unless a divisor is given.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvprune.scoring.ranking import rank_within
from kvprune.tokens.visibility import Visibility

__all__ = ["lines", "pool_neighbours"]


def pool_neighbours(
    scores: Tensor,
    places: Tensor,
    images: Tensor,
    counted: Tensor,
    kernel: int,
    reduction: Literal["avg", "max"] = "avg",
    divisor: int | None = None,
) -> Tensor:
    """Replace each score by the mean or maximum of the scores in a window around its column.

    Args:
        scores: ``[B, H, S]``, finite for counted columns.
        places: int64 ``[B or 1, S, 2]``, row and column in the image (see `kvprune.Layout`). Columns that
            share a place (words in one patch) are neighbours, and each counts.
        images: int64 ``[B or 1, S]``, only columns with equal numbers are neighbours.
        counted: bool ``[B, S]``, columns that take part.
        kernel: Width and height of the window, odd.
        reduction: "avg" (the mean of the neighbours that exist) or "max".
        divisor: "avg" divides by this number in place of the number of neighbours that exist. The size of a
            whole window, for example, counts zeros beyond a border.

    Returns:
        ``[B, H, S]`` in the dtype of ``scores``. Columns that are not counted, or have no place (-1), keep
        their own score and do not enter the windows of others.

    Cost: a few copies of one image's scores in float64; a few host transfers for each image.

    Example:
        >>> places = torch.tensor([[[0, 0], [0, 1], [0, 2]]])
        >>> images, counted = torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool)
        >>> pool_neighbours(torch.tensor([[[0.0, 3.0, 6.0]]]), places, images, counted, kernel=3)
        tensor([[[1.5000, 3.0000, 4.5000]]])
    """
    batch = scores.shape[0]
    pooled = scores.clone()
    there = counted & (places >= 0).all(-1)  # [B, S]
    places, images = places.expand(batch, -1, -1), images.expand(batch, -1)
    for sample in range(batch):
        for image in images[sample][there[sample]].unique().tolist():
            columns = (there[sample] & (images[sample] == image)).nonzero().squeeze(1)
            place = places[sample, columns]
            place = place - place.amin(0)
            height, width = (place.amax(0) + 1).tolist()
            cells = place[:, 0] * width + place[:, 1]  # [n], index into the flattened image
            # In float64, the mean of equal scores is the same for any number of neighbours.
            grid = scores.new_zeros(scores.shape[1] + 1, height * width, dtype=torch.float64)
            own = scores[sample][:, columns].double()  # [H, n]
            if reduction == "max":
                grid[:-1].scatter_reduce_(1, cells.expand_as(own), own, "amax", include_self=False)
            else:
                grid[:-1].index_add_(1, cells, own)
            grid[-1].index_add_(0, cells, torch.ones_like(own[0]))  # columns in each cell
            grid = _pool(grid.view(-1, height, width), kernel, reduction, divisor).flatten(1)
            pooled[sample][:, columns] = grid[:, cells].to(scores.dtype)
    return pooled


def _pool(grid: Tensor, kernel: int, reduction: str, divisor: int | None) -> Tensor:
    """Pool ``[H + 1, height, width]``, whose last plane counts the columns in each cell, to H planes."""
    height, width = grid.shape[1:]
    # A window need not be larger than the image in either direction; a line has only one row.
    reach = (min(kernel // 2, height - 1), min(kernel // 2, width - 1))
    size = (2 * reach[0] + 1, 2 * reach[1] + 1)
    if reduction == "max":
        grid = grid[:-1].masked_fill(grid[-1:] == 0, -torch.inf)
        return F.max_pool2d(grid[None], size, stride=1, padding=reach)[0]
    sums = F.avg_pool2d(grid[None], size, stride=1, padding=reach, divisor_override=1)[0]
    return sums[:-1] / (sums[-1:].clamp(min=1) if divisor is None else divisor)


def lines(visibility: Visibility, counted: Tensor, segments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return places and images for `pool_neighbours` that make columns neighbours by their cache order.

    Each segment (by default each unit of the visibility, in Mllama a tile) becomes one line, on which its
    counted columns follow each other without gaps.

    Args:
        visibility: Visibility of the columns.
        counted: bool ``[B, S]``, columns that take part.
        segments: int64 ``[B or 1, S]``, the line of each column, such as `View.segments`.

    Returns:
        Places int64 ``[B, S, 2]``, all in row 0, and the number of each column's line, int64 ``[B, S]``.
    """
    segments = visibility.units if segments is None else segments
    units = torch.where(counted, segments.expand_as(counted), -1)
    position = rank_within(torch.zeros_like(units, dtype=torch.float32)[:, None], units)[:, 0]
    return torch.stack([torch.zeros_like(position), position], dim=-1), units
