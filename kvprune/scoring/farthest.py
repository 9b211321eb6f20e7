"""Farthest-point sampling: tokens that are far from each other in cosine distance."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kvprune.scoring import greedy
from kvprune.scoring.greedy import on_grid
from kvprune.scoring.similarity import Directions

__all__ = ["farthest_first"]

_AT_ONCE = 256  # vectors that others are compared with at a time
_ALL = 512  # of so few, all pairs are compared


def farthest_first(vectors: Tensor, columns: Tensor, count: int) -> Tensor:
    """Return columns in the order in which farthest-point sampling picks them.

    The first is the one whose nearest neighbour is farthest in cosine distance; each further one is the one
    whose nearest picked one is farthest. Cosines are computed in float64 and rounded to multiples of 2^-40;
    equal ones are ordered by position. A zero vector has the cosine 0 with all others.

    Args:
        vectors: ``[S, C]`` in any dtype.
        columns: int64 ``[n]``, the columns that take part, in increasing order.
        count: At most n.

    Returns:
        int64 ``[count]``, places among the n columns.

    Raises:
        ScoreError: If a vector is NaN or infinite.

    Cost: about S C products for each pick at worst, and all S^2 C at worst for the first one; on random
    vectors and on real features a small part of that, because tokens that have a near neighbour drop out.

    Example:
        >>> vectors = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
        >>> farthest_first(vectors, torch.arange(3), 2)
        tensor([2, 0])
    """
    directions = Directions(vectors, columns)
    slack = directions.slack()
    first = _most_isolated(directions, slack)
    if count == 1:
        return first
    rule = _Farthest(directions, slack, first)
    return torch.cat([first, greedy.pick(rule, count - 1)])


class _Farthest(greedy.GreedyRule):
    """The gain of a token is minus its cosine with the nearest picked token."""

    def __init__(self, directions: Directions, slack: float, first: Tensor) -> None:
        self._directions, self._slack = directions, slack
        self._picked = first  # int64 [t]
        self._seen = torch.zeros(len(directions), dtype=torch.int64, device=first.device)
        self.bounds = torch.full_like(self._seen, 2.0, dtype=directions.exactly)  # cosines are at least -2
        self.bounds[first] = -torch.inf

    def stale(self, tokens: Tensor) -> Tensor:
        return self._seen[tokens] < len(self._picked)

    def refresh(self, tokens: Tensor) -> None:
        for some in tokens[self._seen[tokens].argsort()].split(_AT_ONCE):  # similar numbers of picks to see
            for recent in self._picked[int(self._seen[some[0]]) :].split(_AT_ONCE):
                alike = self._directions.screened(self._directions.at(recent), some).amax(1)  # [k]
                bound = self._slack - alike.to(self.bounds.dtype)
                self.bounds[some] = torch.minimum(self.bounds[some], bound)
        self._seen[tokens] = len(self._picked)

    def rehearse(self, tokens: Tensor) -> _Alike:
        units = self._directions.exact(tokens)  # [a, C]
        nearest = torch.cat(
            [
                on_grid(units @ self._directions.exact(some).mT).amax(1, keepdim=True)
                for some in self._picked.split(_AT_ONCE)
            ],
            dim=1,
        ).amax(1)  # [a]
        self._seen[tokens] = len(self._picked)
        self.bounds[tokens] = torch.minimum(self.bounds[tokens], -nearest)
        return _Alike(self.bounds[tokens], units)

    def accept(self, rehearsal: greedy.Rehearsal, tokens: Tensor, places: Tensor) -> None:
        assert isinstance(rehearsal, _Alike)
        self._picked = torch.cat([self._picked, tokens[places]])
        self.bounds[tokens] = torch.minimum(self.bounds[tokens], -rehearsal.alike[places].amax(0))
        self._seen[tokens] = len(self._picked)


class _Alike(greedy.Rehearsal):
    """Some tokens, their cosine with the nearest picked token, and all cosines among them."""

    def __init__(self, gains: Tensor, units: Tensor) -> None:
        self.gains, self._units = gains, units  # [a], [a, C]

    def picks(self) -> Iterator[tuple[Tensor, Tensor]]:
        nearest = -self.gains
        self.alike = on_grid(self._units @ self._units.mT)  # [a, a]
        self.alike.diagonal().fill_(torch.inf)  # a picked token is never picked again
        while True:
            place = nearest.argmin(keepdim=True)  # [1], the first of equal ones
            yield place[0], -nearest[place][0]
            nearest = torch.maximum(nearest, self.alike[place][0])


def _most_isolated(directions: Directions, slack: float) -> Tensor:
    """Return the place of the vector whose nearest neighbour is farthest, ``[1]``."""
    n, device = len(directions), directions.nonzero.device
    everyone = torch.arange(n, device=device)
    if n <= _ALL:
        alike = directions.exact(everyone)
        alike = on_grid(alike @ alike.mT)  # [n, n]
        alike.diagonal().fill_(-1)
        return alike.amax(1).argmin(keepdim=True)
    nearest = _Nearest(directions, slack)
    likely = nearest.complete(everyone[:: max(1, n // 64)])
    for bound in (likely, torch.inf):  # first what is likely, then what is left
        for others in everyone.split(_AT_ONCE):
            alive = nearest.alive(bound)
            if len(alive) <= _AT_ONCE // 4:
                nearest.complete(alive)
                break
            nearest.compare(alive, others)
        else:
            nearest.close(nearest.alive(bound))
    return nearest.first()


class _Nearest:
    """The highest cosine of each vector with another one: bounds, which become exact where they must."""

    def __init__(self, directions: Directions, slack: float) -> None:
        n, device = len(directions), directions.nonzero.device
        self._directions, self._slack = directions, slack
        self.bounds = torch.full((n,), -2.0, dtype=directions.dtype, device=device)  # [n], only rise
        self._partners = torch.zeros(n, dtype=torch.int64, device=device)  # [n], whose cosine the bound is
        self._complete = torch.zeros(n, dtype=torch.bool, device=device)
        self._best = torch.full((), torch.inf, dtype=directions.dtype, device=device)

    def alive(self, bound: float) -> Tensor:
        """Return the vectors that may be the most isolated one and have not been compared with all.

        Args:
            bound: Leaves out vectors with a higher cosine.
        """
        low = self.bounds <= (self._best + 2 * self._slack).clamp(max=bound)
        return (low & ~self._complete).nonzero().squeeze(1)

    def compare(self, some: Tensor, others: Tensor) -> None:
        """Raise the bounds of some vectors by their cosines with some others."""
        alike = self._directions.screened(self._directions.at(others), some)  # [k, m]
        alike.masked_fill_(some[:, None] == others, -2)
        self._raise(some, *alike.max(1), others)

    def complete(self, some: Tensor) -> float:
        """Compare some vectors with all others.

        Returns:
            What the highest cosine of the most isolated vector would be if cosines were independent: log n of
            n cosines are above it.
        """
        likely = torch.inf
        for few in some.split(_AT_ONCE) if len(some) else ():
            alike = self._directions.screened(self._directions.at(few))  # [n, m]
            alike[few, torch.arange(len(few), device=few.device)] = -2  # the vector itself
            everyone = torch.arange(len(alike), device=few.device)
            self._raise(few, *alike.max(0), everyone)
            self._raise(everyone, *alike.max(1), few)
            self.close(few)
            likely = float(alike.topk(round(math.log(len(alike))), dim=0).values[-1].mean())
        return likely

    def close(self, some: Tensor) -> None:
        """Note that some vectors have been compared with all others."""
        if len(some):
            self._complete[some] = True
            self._best = torch.minimum(self._best, self.bounds[some].amin())

    def _raise(self, some: Tensor, alike: Tensor, which: Tensor, others: Tensor) -> None:
        higher = alike > self.bounds[some]
        self.bounds[some] = torch.where(higher, alike, self.bounds[some])
        self._partners[some] = torch.where(higher, others[which], self._partners[some])

    def first(self) -> Tensor:
        """Return the most isolated vector, the first of equal ones, ``[1]``."""
        left = (self._complete & (self.bounds <= self._best + 2 * self._slack)).nonzero().squeeze(1)
        if len(left) == 1:
            return left
        # One cosine may already show that a vector is not the first of the most isolated ones.
        shown = torch.cat(
            [
                on_grid((self._directions.exact(some) * self._directions.exact(self._partners[some])).sum(-1))
                for some in left.split(_AT_ONCE)
            ]
        )  # [k]
        best, found = torch.inf, left[:1]
        while len(left):
            value = self._exactly(left[:1])
            if value < best:
                best, found = value, left[:1]
            left, shown = left[1:][shown[1:] < best], shown[1:][shown[1:] < best]
        return found

    def _exactly(self, one: Tensor) -> float:
        unit = self._directions.exact(one)[0]  # [C]
        everyone = torch.arange(len(self.bounds), device=one.device)
        others = everyone[everyone != one]
        alike = [on_grid(self._directions.exact(some) @ unit).amax() for some in others.split(_AT_ONCE)]
        return float(torch.stack(alike).amax())
