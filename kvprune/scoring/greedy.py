"""Picks tokens greedily, one after another, and looks only at tokens that may be next.

Gains of a greedy rule only fall as more tokens are picked. So an old gain is an upper bound of the gain now
(Minoux, 1978), and most tokens need no new one. Tokens that may be next are compared in float64, so the order
does not depend on the size of a batch or on how a device adds up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["GreedyRule", "Rehearsal", "on_grid", "pick"]

_FRONT = 64  # tokens whose gains are computed exactly at a time
_FEW = 512  # so few tokens are all computed exactly
_STEPS = 8  # picks between two looks at whether they hold, which is a host transfer on a GPU
_GRID = 2.0**40


def on_grid(numbers: Tensor) -> Tensor:
    """Round numbers of at most 1 to multiples of 2^-40, so that rounding errors of float64 break no tie."""
    return numbers.mul(_GRID).round_().div_(_GRID)


class Rehearsal(ABC):
    """Some tokens with their exact gains, of which a greedy rule picks some.

    Attributes:
        gains: Exact gains before the first pick, ``[a]``.
    """

    gains: Tensor

    @abstractmethod
    def picks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the place of the best token among them and its gain, both scalars, pick after pick."""


class GreedyRule(ABC):
    """What `pick` asks about n tokens; a gain only falls when a token is picked.

    Attributes:
        bounds: Upper bounds of each token's gain, float64 ``[n]``; -inf for picked tokens.
    """

    bounds: Tensor

    @abstractmethod
    def stale(self, tokens: Tensor) -> Tensor:
        """Return which of some tokens have bounds that leave out recent picks, bool ``[k]``."""

    @abstractmethod
    def refresh(self, tokens: Tensor) -> None:
        """Lower the bounds of some tokens by recent picks, fast and not exactly."""

    @abstractmethod
    def rehearse(self, tokens: Tensor) -> Rehearsal:
        """Compute the exact gains of some tokens; `bounds` keeps them."""

    @abstractmethod
    def accept(self, rehearsal: Rehearsal, tokens: Tensor, places: Tensor) -> None:
        """Take over the first picks of a rehearsal of some tokens; their places are int64 ``[p]``."""


def pick(rule: GreedyRule, count: int) -> Tensor:
    """Return ``count`` of n tokens in the order in which a rule picks them; equal gains by position.

    Args:
        rule: The rule, before any pick; its bounds change.
        count: At most n.

    Returns:
        int64 ``[count]``.
    """
    order: list[Tensor] = []
    left, free = count, int((rule.bounds > -torch.inf).sum())
    while left:
        tokens, rehearsal, rival = _front(rule, free)
        places, gains = [], []
        for place, gain in rehearsal.picks():
            places.append(place)
            gains.append(gain)
            if len(places) % _STEPS == 0 or len(places) == min(left, len(tokens)):
                holds = _before(torch.stack(gains), tokens[torch.stack(places)], rule.bounds, rival)
                number = int(holds.to(torch.int64).cumprod(0).sum())
                if number < len(places) or number == min(left, len(tokens)):
                    break
        chosen = torch.stack(places[:number])  # [p]
        rule.accept(rehearsal, tokens, chosen)
        rule.bounds[tokens[chosen]] = -torch.inf
        order.append(tokens[chosen])
        left, free = left - number, free - number
    return torch.cat(order)


def _front(rule: GreedyRule, free: int) -> tuple[Tensor, Rehearsal, Tensor | None]:
    """Return tokens of which one is picked next, their rehearsal, and the best of the other tokens."""
    size = free if len(rule.bounds) <= _FEW else min(_FRONT, free)
    width = 4 * size  # so many tokens are refreshed together, and more each time
    while True:
        order = rule.bounds.argsort(descending=True, stable=True)  # equal bounds by position
        front = order[:size]
        if size < free:
            near = order[: min(width, free)]
            stale = rule.stale(near)
            if bool(stale[:size].any()):
                rule.refresh(near[stale])
                width *= 2
                continue
        front = front.sort().values
        rehearsal = rule.rehearse(front)
        if size == free:
            return front, rehearsal, None
        rival, best = order[size], rehearsal.gains.argmax()
        if bool(_before(rehearsal.gains[best], front[best], rule.bounds, rival)):
            return front, rehearsal, rival


def _before(gains: Tensor, tokens: Tensor, bounds: Tensor, rival: Tensor | None) -> Tensor:
    """Return which tokens come before a rival whatever its gain is, with these gains."""
    if rival is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    return (gains > bounds[rival]) | ((gains == bounds[rival]) & (tokens < rival))
