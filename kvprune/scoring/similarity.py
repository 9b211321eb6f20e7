"""Cosine similarity of tokens, computed in blocks, for policies that compare features.

Features have thousands of channels. Blocks avoid a float32 copy of all features and the matrix of all pairs.
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
    """Unit vectors of chosen columns, computed in blocks. A zero vector stays zero.

    Args:
        vectors: ``[S, C]`` in any dtype. The computation runs in float32 (float64 for float64).
        columns: int64 ``[n]``, the chosen columns, in increasing order.

    Example:
        >>> directions = Directions(torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.0, 2.0]]), torch.tensor([0, 2]))
        >>> directions.cosines(torch.tensor([[1.0, 0.0]]))
        tensor([[1.],
                [0.]])
    """

    def __init__(self, vectors: Tensor, columns: Tensor) -> None:
        self._vectors, self._columns = vectors, columns
        self._whole = len(columns) == len(vectors)  # all columns, in order: no need to gather
        self.dtype = accumulation_dtype(vectors)
        self.lengths = torch.cat([torch.linalg.vector_norm(block, dim=-1) for _, block in self._raw_blocks()])
        """Length of each chosen vector, ``[n]``."""
        self._inverse = torch.where(self.lengths > 0, 1 / self.lengths, 0)

    def __len__(self) -> int:
        return len(self._columns)

    @property
    def width(self) -> int:
        """Number of channels C."""
        return self._vectors.shape[-1]

    @property
    def nonzero(self) -> Tensor:
        """Which vectors are not zero, bool ``[n]``."""
        return self._inverse > 0

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of the chosen columns and their unit vectors ``[m, C]``."""
        for rows, block in self._raw_blocks():
            yield rows, block * self._inverse[rows, None]

    def at(self, position: Tensor) -> Tensor:
        """Return the unit vector of one chosen column, ``[C]``, without a host transfer.

        Args:
            position: int64 scalar, the position among the chosen columns.
        """
        index = position.reshape(1)
        vector = self._vectors.index_select(0, self._columns.index_select(0, index)).to(self.dtype)
        return (vector * self._inverse.index_select(0, index))[0]

    def cosines(self, others: Tensor) -> Tensor:
        """Return the cosine of each chosen column with each of m unit vectors, ``[m, C]`` to ``[n, m]``."""
        # Scaling the result saves a pass over the vectors. Greedy methods call this once per kept token.
        return torch.cat([block @ others.mT for _, block in self._raw_blocks()]) * self._inverse[:, None]

    def nearest(self) -> Tensor:
        """Return each vector's highest cosine with another chosen one, ``[n]``; -1 if there is no other."""
        found = []
        for rows, others in self.blocks():
            alike = self.cosines(others)  # [n, m]
            alike.diagonal(-rows.start).fill_(-1)  # the vector itself
            found.append(alike.amax(0))
        return torch.cat(found)

    def _raw_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        size = max(1, min(_ELEMENTS_PER_BLOCK // max(self.width, len(self)), len(self)))
        for first in range(0, len(self), size):
            rows = slice(first, min(first + size, len(self)))
            chosen = self._vectors[rows] if self._whole else self._vectors[self._columns[rows]]
            yield rows, chosen.to(self.dtype)


def most_alike(vectors: Tensor, takers: Tensor, joining: Tensor, cells: Tensor) -> Tensor:
    """Assign each joining column to the most similar taker of its cell (cosine similarity).

    Among equally similar takers, the first is chosen.

    Args:
        vectors: ``[B, S, C]`` in any dtype, the features that are compared.
        takers: bool ``[B, S]``, columns that others may be assigned to, for example the kept ones.
        joining: bool ``[B, S]``, columns that are assigned, for example the dropped ones.
        cells: int64 ``[B, S]``, the cell of each column, for example its image: only columns of one cell are
            compared. Columns of cell -1 take no part.

    Returns:
        int64 ``[B, S]``, the taker of each joining column; -1 for all other columns, and if the cell has no
        taker.

    Cost: C multiplications for each pair of joining column and taker, a few MiB at a time.

    Example:
        Columns 0 and 1 are kept; column 2 points almost the same way as column 1.

        >>> vectors = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]]])
        >>> kept = torch.tensor([[True, True, False]])
        >>> most_alike(vectors, kept, ~kept, torch.tensor([[0, 0, 0]]))
        tensor([[-1, -1,  1]])
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
