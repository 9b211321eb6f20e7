"""Pooling scores over neighbouring tokens, so that what is kept comes in patches and not in crumbs.

Neighbours are never taken across the border of an image, and nothing that does not count takes part: the
mean at a border is the mean of fewer tokens, not a mean with zeros.
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
) -> Tensor:
    """Replace each score by the mean (or maximum) over the window around its place.

    Args:
        scores: ``[B, H, S]``, finite where counted.
        places: int64 ``[B or 1, S, 2]``, row and column; at most one column of an image has a place.
        images: int64 ``[B or 1, S]``, columns with different numbers are no neighbours.
        counted: bool ``[B, S]``, columns that may be neighbours.
        kernel: Width and height of the window, odd.
        reduction: "avg" over the neighbours that are there, or "max".

    Returns:
        ``[B, H, S]`` of the dtype of ``scores``. Columns that are not counted, or have no place (-1),
        keep their own score and are nobody's neighbours.

    Cost: some copies of one image's scores in float64; a few host transfers for each image.
    """
    batch = scores.shape[0]
    pooled = scores.clone()
    there = counted & (places >= 0).all(-1)
    places, images = places.expand(batch, -1, -1), images.expand(batch, -1)
    for sample in range(batch):
        for image in images[sample][there[sample]].unique().tolist():
            columns = (there[sample] & (images[sample] == image)).nonzero().squeeze(1)
            place = places[sample, columns]
            place = place - place.amin(0)
            height, width = (place.amax(0) + 1).tolist()
            cells = place[:, 0] * width + place[:, 1]
            # In float64, equal scores stay equal whatever the number of their neighbours.
            grid = scores.new_zeros(scores.shape[1] + 1, height * width, dtype=torch.float64)
            grid[:-1, cells] = scores[sample][:, columns].double()
            grid[-1, cells] = 1  # which cells are there
            grid = _pool(grid.view(-1, height, width), kernel, reduction).flatten(1)
            pooled[sample][:, columns] = grid[:, cells].to(scores.dtype)
    return pooled


def _pool(grid: Tensor, kernel: int, reduction: str) -> Tensor:
    """Pool ``[H + 1, height, width]``, whose last plane marks the cells that are there, to H planes."""
    height, width = grid.shape[1:]
    # A window that reaches beyond both ends is as good as one that just does; a line has one row.
    reach = (min(kernel // 2, height - 1), min(kernel // 2, width - 1))
    size = (2 * reach[0] + 1, 2 * reach[1] + 1)
    if reduction == "max":
        grid = grid[:-1].masked_fill(grid[-1:] == 0, -torch.inf)
        return F.max_pool2d(grid[None], size, stride=1, padding=reach)[0]
    sums = F.avg_pool2d(grid[None], size, stride=1, padding=reach, divisor_override=1)[0]
    return sums[:-1] / sums[-1:].clamp(min=1)


def lines(visibility: Visibility, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Return places and images as `pool_neighbours` takes them, for neighbours in the order of the cache.

    Each unit of the visibility (a tile, or what an encoder read of one sample) is a line of its own; counted
    columns stand on it one after another.

    Args:
        visibility: Of the columns.
        counted: bool ``[B, S]``.

    Returns:
        Places int64 ``[B, S, 2]``, all in row 0, and the number of the line int64 ``[B, S]``.
    """
    units = torch.where(counted, visibility.units.expand_as(counted), -1)
    position = rank_within(torch.zeros_like(units, dtype=torch.float32)[:, None], units)[:, 0]
    return torch.stack([torch.zeros_like(position), position], dim=-1), units
