"""Cosine similarity of tokens, computed in blocks, for policies that compare features.

Features have thousands of channels. Blocks avoid a float32 copy of all features and the matrix of all pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kvprune.errors import ScoreError
from kvprune.scoring.ranking import members
from kvprune.tokens.precision import accumulation_dtype

__all__ = ["Directions", "most_alike"]

_ELEMENTS_PER_BLOCK = 2**20  # 4 MiB of float32
_ELEMENTS_SCREENED = 2**22  # 16 MiB: large products are faster


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
        self._finite = self.lengths.isfinite().all()

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

    def cosines(self, others: Tensor) -> Tensor:
        """Return the cosine of each chosen column with each of m unit vectors, ``[m, C]`` to ``[n, m]``."""
        # Scaling the result saves a pass over the vectors. Greedy methods call this once per kept token.
        return torch.cat([block @ others.mT for _, block in self._raw_blocks()]) * self._inverse[:, None]

    def at(self, positions: Tensor) -> Tensor:
        """Return unit vectors of some chosen columns, int64 ``[k]`` to ``[k, C]``."""
        return self._vectors[self._columns[positions]].to(self.dtype) * self._inverse[positions, None]

    def screened(self, others: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return cosines of some chosen columns, or of all, with m unit vectors: fast, and off by `slack`.

        Args:
            others: ``[m, C]``, unit vectors in `dtype`.
            positions: int64 ``[k]`` among the chosen columns; None for all of them.

        Returns:
            ``[k, m]``.
        """
        others = others.mT  # [C, m]
        columns = self._columns if positions is None else self._columns[positions]
        whole = self._whole and positions is None
        if whole and self._vectors.dtype == self.dtype:
            return (self._vectors @ others) * self._inverse[:, None]
        parts = []
        for first in range(0, len(columns), size := max(1, _ELEMENTS_SCREENED // self.width)):
            rows = slice(first, first + size)
            chosen = self._vectors[rows] if whole else self._vectors[columns[rows]]
            parts.append(chosen.to(self.dtype) @ others)
        return torch.cat(parts) * (self._inverse if positions is None else self._inverse[positions])[:, None]

    @property
    def exactly(self) -> torch.dtype:
        """The dtype of `exact`: float64, but float32 on devices without it (mps)."""
        return torch.float32 if self._vectors.device.type == "mps" else torch.float64

    def exact(self, positions: Tensor) -> Tensor:
        """Return unit vectors of some chosen columns in `exactly`, int64 ``[k]`` to ``[k, C]``."""
        vectors = self._vectors[self._columns[positions]].to(self.exactly)
        lengths = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
        return torch.where(lengths > 0, vectors / lengths, 0)

    def slack(self) -> float:
        """Return how far `screened` may be from the exact cosine.

        The error of a sum of C products grows with the root of C (Higham and Mary, 2019: a bound of 4 roots
        holds with overwhelming probability). Settings such as TF32 or autocast round more, so some cosines
        are compared with exact ones, and the bound is at least eight times what was found.

        Raises:
            ScoreError: If a vector is NaN or infinite, so that nothing can be compared.
        """
        if not bool(self._finite):
            raise ScoreError(
                "features or keys of some tokens are NaN or infinite, so their directions cannot be "
                "compared; the model's activations overflow"
            )
        some = torch.arange(0, len(self), max(1, len(self) // 32), device=self._columns.device)[:32]
        units = self.exact(some)  # [k, C]
        found = (self.screened(self.at(some), some) - units @ units.mT).abs().amax()
        usual = (4 * math.sqrt(self.width) + 8) * torch.finfo(self.dtype).eps / 2
        return max(usual, 8 * float(found)) + 2.0**-40

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
