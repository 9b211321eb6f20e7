"""Greedy volume maximisation (a determinantal point process): relevant tokens that differ from each other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvprune.scoring import greedy
from kvprune.scoring.greedy import on_grid
from kvprune.scoring.similarity import Directions

__all__ = ["largest_volume"]

_AT_ONCE = 256  # tokens whose bounds are refreshed together


def largest_volume(vectors: Tensor, columns: Tensor, weights: Tensor, count: int) -> Tensor:
    """Return columns in the order in which greedy volume maximisation picks them.

    Each vector is scaled to the length of its weight. Each pick is the column whose vector adds most to the
    squared volume: its squared weight times the squared length of the part of its direction that is
    orthogonal to all picked ones (Chen et al., 2018, arXiv 1709.05135). Once nothing adds volume, columns
    follow by weight. Lengths are computed in float64 and rounded to multiples of 2^-40; equal gains are
    ordered by position.

    Args:
        vectors: ``[S, C]`` in any dtype.
        columns: int64 ``[n]``, the columns that take part, in increasing order.
        weights: ``[n]``, in (0, 1].
        count: At most n.

    Returns:
        int64 ``[count]``, places among the n columns.

    Raises:
        ScoreError: If a vector is NaN or infinite.

    Cost: at most about S C products for each pick, and a basis of min(count, C) x C numbers in float64.

    Example:
        >>> vectors = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
        >>> largest_volume(vectors, torch.arange(3), torch.tensor([0.5, 1.0, 0.9]), 2)
        tensor([1, 2])
    """
    directions = Directions(vectors, columns)
    return greedy.pick(_Volume(directions, weights, count), count)


class _Volume(greedy.GreedyRule):
    """The gain of a token is the squared volume that it adds; without any, its weight - 2, which is negative.

    An orthonormal basis of the span of the picked tokens takes the place of the Cholesky factor.
    """

    def __init__(self, directions: Directions, weights: Tensor, count: int) -> None:
        self._directions, self._slack = directions, directions.slack()
        self._exhausted = 1e-5 if directions.dtype == torch.float32 else 1e-12
        self._left = directions.nonzero.to(directions.exactly)  # [n], what is orthogonal to the basis
        self._weights = weights.to(self._left.dtype)
        self._basis = self._left.new_zeros(min(count, directions.width), directions.width)  # [most, C]
        self._rank = 0
        self._seen = torch.zeros_like(self._left, dtype=torch.int64)  # [n], how much of the basis
        self.bounds = self.gains(self._left, self._weights)

    def gains(self, left: Tensor, weights: Tensor) -> Tensor:
        """Return gains from squared orthogonal lengths and weights, all ``[k]``."""
        return torch.where(left > self._exhausted, weights.square() * on_grid(left), weights - 2)

    def stale(self, tokens: Tensor) -> Tensor:
        return self._seen[tokens] < self._rank

    def refresh(self, tokens: Tensor) -> None:
        for some in tokens[self._seen[tokens].argsort()].split(_AT_ONCE):  # similar parts of the basis to see
            seen = self._seen[some]
            first = int(seen[0])
            along = self._directions.screened(
                self._basis[first : self._rank].to(self._directions.dtype), some
            )
            known = torch.arange(first, self._rank, device=seen.device) < seen[:, None]  # [k, recent]
            self._left[some] -= along.masked_fill_(known, 0).to(self._left.dtype).square_().sum(1)
        self._seen[tokens] = self._rank
        error = 2 * self._slack * self._rank**0.5 + self._rank * self._slack**2
        upper = self.gains((self._left[tokens] + error).clamp_(0, 1), self._weights[tokens])
        self.bounds[tokens] = torch.minimum(self.bounds[tokens], upper)

    def rehearse(self, tokens: Tensor) -> _Residues:
        units = self._directions.exact(tokens)  # [a, C]
        along = units @ self._basis[: self._rank].mT  # [a, rank]
        left = (self._directions.nonzero[tokens].to(along.dtype) - along.square().sum(1)).clamp_(min=0)  # [a]
        if self._rank == self._directions.width:
            left.zero_()  # the whole space is spanned
        self._left[tokens], self._seen[tokens] = left, self._rank
        gains = torch.minimum(self.bounds[tokens], self.gains(left, self._weights[tokens]))
        self.bounds[tokens] = gains
        return _Residues(self, units, along, left, self._weights[tokens], gains)

    def accept(self, rehearsal: greedy.Rehearsal, tokens: Tensor, places: Tensor) -> None:
        assert isinstance(rehearsal, _Residues)
        factor = rehearsal.factor[:, : len(places)]  # [a, p]
        left = (rehearsal.left - factor.square().sum(1)).clamp_(min=0)  # [a]
        spans = factor[places].diagonal() > 0  # [p]
        spans &= spans.cumsum(0) <= len(self._basis) - self._rank
        if bool(spans.any()):
            added = places[spans]
            basis = self._basis[: self._rank]
            fresh = rehearsal.units[added] - rehearsal.along[added] @ basis  # [r, C]
            fresh = _orthonormal(fresh, factor[added][:, spans])
            fresh -= (
                fresh @ basis.mT
            ) @ basis  # once would leave rounding errors as large as the result may be
            fresh = _orthonormal(fresh, torch.linalg.cholesky(fresh @ fresh.mT))
            self._basis[self._rank : self._rank + len(fresh)] = fresh
            self._rank += len(fresh)
        self._left[tokens], self._seen[tokens] = left, self._rank
        self.bounds[tokens] = torch.minimum(self.bounds[tokens], self.gains(left, self._weights[tokens]))


class _Residues(greedy.Rehearsal):
    """Some tokens, their coordinates in the basis, and the Cholesky factor of what is orthogonal to it."""

    def __init__(
        self, rule: _Volume, units: Tensor, along: Tensor, left: Tensor, weights: Tensor, gains: Tensor
    ) -> None:
        self._rule, self._weights = rule, weights
        self.units, self.along, self.left, self.gains = units, along, left, gains
        self.factor = along.new_zeros(len(units), len(units))  # [a, picks], filled by `picks`

    def picks(self) -> Iterator[tuple[Tensor, Tensor]]:
        residues = self.units @ self.units.mT - self.along @ self.along.mT  # [a, a]
        left, gains = self.left, self.gains
        taken = torch.zeros_like(left, dtype=torch.bool)
        for step in range(len(gains)):
            place = gains.argmax(keepdim=True)  # [1], the first of equal ones
            gain = gains[place]  # [1]
            length = left[place].sqrt()  # [1]
            row = residues[place][0] - self.factor[:, :step] @ self.factor[place, :step][0]  # [a]
            self.factor[:, step] = torch.where(gain > 0, row / length, 0)  # without volume, nothing changes
            yield place[0], gain[0]
            taken[place] = True
            left = (left - self.factor[:, step].square()).clamp_(min=0)
            gains = self._rule.gains(left, self._weights).masked_fill_(taken, -torch.inf)


def _orthonormal(rows: Tensor, factor: Tensor) -> Tensor:
    """Return the rows ``[r, C]`` divided by the lower triangular factor of their products ``[r, r]``."""
    quotient: Tensor = torch.linalg.solve_triangular(factor, rows, upper=False)
    return quotient
