"""KV07 and KV08: policies that drop tokens at the budget 1."""

from __future__ import annotations

from dataclasses import dataclass

from kvprune import Budget, Decision, Selection, scoring
from zoo.helpers import Ranking, by_norm, keep


@dataclass(frozen=True, kw_only=True)
class AllButOne(Ranking):
    name = "all-but-one"
    caught_by = ("KV07", "KV08")

    def select(self, view):
        strata = view.decode_strata
        limit = scoring.limits(Budget(keep_ratio=self.keep_ratio), strata)
        return keep(view, by_norm(view), (limit - 1).clamp(min=1))


@dataclass(frozen=True, kw_only=True)
class LosesTheLastTile(Ranking):
    """Drops the last visible column if there is padding."""

    name = "loses-the-last-tile"
    caught_by = ("KV08",)

    def select(self, view):
        seen = view.strata == 0
        several = seen.sum(-1, keepdim=True) > 1
        last = seen & (seen.cumsum(-1) == seen.sum(-1, keepdim=True)) & several & ~seen.all(-1, keepdim=True)
        kept = seen & ~last
        kept[..., 0] |= ~kept.any(-1)
        return Decision(cache=Selection.from_mask(kept[:, None]))
