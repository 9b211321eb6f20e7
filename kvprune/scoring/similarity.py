"""Which way tokens point: cosines of long vectors, a block at a time, for policies that want variety.

Features are thousands of numbers wide, so neither a float32 copy of all of them nor the matrix of all pairs
is ever held.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvprune.scoring.ranking import members
from kvprune.tokens.precision import accumulation_dtype

__all__ = ["Directions", "most_alike"]

_ELEMENTS_PER_BLOCK = 2**20  # 4 MiB of float32


class Directions:
    """Unit vectors of chosen columns; a vector of zeros stays zero.

    Args:
        vectors: ``[S, C]`` in any dtype; float64 is computed with as it is, everything else in float32.
        columns: int64 ``[n]``, the chosen ones, in order.
    """

    def __init__(self, vectors: Tensor, columns: Tensor) -> None:
        self._vectors, self._columns = vectors, columns
        self._whole = len(columns) == len(vectors)  # then columns are in order, and nothing need be gathered
        self.dtype = accumulation_dtype(vectors)
        lengths = torch.cat([torch.linalg.vector_norm(block, dim=-1) for _, block in self._raw_blocks()])
        self._inverse = torch.where(lengths > 0, 1 / lengths, 0)

    def __len__(self) -> int:
        return len(self._columns)

    @property
    def width(self) -> int:
        """Numbers in a vector, C."""
        return self._vectors.shape[-1]

    @property
    def nonzero(self) -> Tensor:
        """Which vectors have a direction at all, bool ``[n]``."""
        return self._inverse > 0

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield positions among the chosen columns, and their unit vectors ``[m, C]``."""
        for rows, block in self._raw_blocks():
            yield rows, block * self._inverse[rows, None]

    def at(self, position: Tensor) -> Tensor:
        """Return the unit vector at a position among the chosen columns, ``[C]``, without a host transfer."""
        index = position.reshape(1)
        vector = self._vectors.index_select(0, self._columns.index_select(0, index)).to(self.dtype)
        return (vector * self._inverse.index_select(0, index))[0]

    def cosines(self, others: Tensor) -> Tensor:
        """Return the cosine with each of a few unit vectors ``[m, C]``, as ``[n, m]``."""
        # Scaled afterwards: that is one pass less over the vectors, and greedy methods ask for each pick.
        return torch.cat([block @ others.mT for _, block in self._raw_blocks()]) * self._inverse[:, None]

    def nearest(self) -> Tensor:
        """Return each vector's cosine with the one most like it, itself left out, ``[n]``; -1 if alone."""
        found = []
        for rows, others in self.blocks():
            alike = self.cosines(others)
            alike.diagonal(-rows.start).fill_(-1)
            found.append(alike.amax(0))
        return torch.cat(found)

    def _raw_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        size = max(1, min(_ELEMENTS_PER_BLOCK // max(self.width, len(self)), len(self)))
        for first in range(0, len(self), size):
            rows = slice(first, min(first + size, len(self)))
            chosen = self._vectors[rows] if self._whole else self._vectors[self._columns[rows]]
            yield rows, chosen.to(self.dtype)


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
    for sample, columns in members(cells):
        taking, leaving = columns[takers[sample, columns]], columns[joining[sample, columns]]
        if len(taking) and len(leaving):
            targets = Directions(vectors[sample], taking)
            best = [
                targets.cosines(some).argmax(0) for _, some in Directions(vectors[sample], leaving).blocks()
            ]
            found[sample, leaving] = taking[torch.cat(best)]
    return found
