"""Which kept token takes a dropped one, by what their features have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from kvprune import scoring
from kvprune.directions import Directions

__all__ = ["most_alike"]


def most_alike(vectors: Tensor, takers: Tensor, joining: Tensor, cells: Tensor) -> Tensor:
    """Return for each joining column the taker in its cell with the highest cosine, of equal ones the first.

    Args:
        vectors: ``[B, S, C]`` in any dtype.
        takers: bool ``[B, S]``.
        joining: bool ``[B, S]``.
        cells: int64 ``[B, S]``, sets that nothing leaves, such as images; -1 for columns that take no part.

    Returns:
        int64 ``[B, S]``, a column; -1 where nothing joins, or its cell has no taker.

    Cost: C products for each pair of joining column and taker, a few MiB at a time.
    """
    found = torch.full_like(cells, -1)
    for sample, columns in scoring.members(cells):
        taking, leaving = columns[takers[sample, columns]], columns[joining[sample, columns]]
        if len(taking) and len(leaving):
            targets = Directions(vectors[sample], taking)
            best = [
                targets.cosines(some).argmax(0) for _, some in Directions(vectors[sample], leaving).blocks()
            ]
            found[sample, leaving] = taking[torch.cat(best)]
    return found
