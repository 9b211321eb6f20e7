"""KV02, KV10, KV14: policies that decide after prefill, correct for one layer but wrong for several."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvprune import Budget, Decision, PrefillPolicy, Selection, scoring
from zoo.helpers import by_norm


@dataclass(frozen=True, kw_only=True)
class Sharing(PrefillPolicy):
    """Each layer keeps its budget and ``shift`` more tokens, as far as it has them."""

    keep_ratio: float = 0.5

    ranks_tokens = True
    budget_scope = "model"

    def observe(self, view):
        return by_norm(view)

    def shift(self, views, rank, limit):
        return torch.zeros_like(limit)

    def conclude(self, views, observed):
        decisions = []
        for rank, (view, scores) in enumerate(zip(views, observed, strict=True)):
            strata = view.decode_strata
            limit = scoring.limits(Budget(keep_ratio=self.keep_ratio), strata)
            room = torch.minimum(limit - 1, scoring.stratum_sizes(strata) - limit).clamp(0, 1)
            limit = limit + (room * self.shift(views, rank, limit) if len(views) > 1 else 0)
            kept = scoring.keep_top(scores, strata, limit, view.visibility)
            decisions.append(Decision(cache=Selection.from_mask(kept)))
        return decisions


@dataclass(frozen=True, kw_only=True)
class OneMoreInLaterLayers(Sharing):
    name = "one-more-in-later-layers"
    caught_by = ("KV02",)

    def shift(self, views, rank, limit):
        return torch.full_like(limit, int(rank > 0))


@dataclass(frozen=True, kw_only=True)
class TakesBack(Sharing):
    """The first layer keeps one more and the second one less; the other way round at odd budgets."""

    name = "takes-back"
    caught_by = ("KV14",)

    def shift(self, views, rank, limit):
        sign = (1, -1)[rank] if rank < 2 else 0
        return torch.where(limit % 2 == 0, sign, -sign)


@dataclass(frozen=True, kw_only=True)
class SharesWithTheBatch(Sharing):
    """If the batch has several samples, the first layer keeps one more and the second one less."""

    name = "shares-with-the-batch"
    caught_by = ("KV10",)

    def shift(self, views, rank, limit):
        sign = (1, -1)[rank] if rank < 2 and len(limit) > 1 else 0
        return torch.full_like(limit, sign)
