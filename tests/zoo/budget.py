"""KV02: budgets that are nearly right."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kvprune import Budget, Decision, Selection, scoring
from zoo.helpers import Ranking, by_norm, keep, sizes


@dataclass(frozen=True, kw_only=True)
class IgnoresBudget(Ranking):
    name = "ignores-budget"
    caught_by = ("KV02",)

    def select(self, view):
        return keep(view, by_norm(view), 3)


@dataclass(frozen=True, kw_only=True)
class OffByOne(Ranking):
    name = "off-by-one"
    caught_by = ("KV02",)

    def select(self, view):
        strata = view.decode_strata
        return keep(view, by_norm(view), scoring.limits(Budget(keep_ratio=self.keep_ratio), strata) + 1)


@dataclass(frozen=True, kw_only=True)
class Truncates(Ranking):
    name = "truncates"
    caught_by = ("KV02",)

    def select(self, view):
        return keep(view, by_norm(view), (sizes(view) * self.keep_ratio).long().clamp(min=1))


@dataclass(frozen=True, kw_only=True)
class RoundsUpInFloats(Ranking):
    """Rounds up in floats, where 7 % of 100 tokens are 7.000000000000001, hence 8."""

    name = "rounds-up-in-floats"
    caught_by = ("KV02",)

    def select(self, view):
        limit = sizes(view).double().apply_(lambda size: math.ceil(self.keep_ratio * size)).long()
        return keep(view, by_norm(view), limit)


@dataclass(frozen=True, kw_only=True)
class CountsPadding(Ranking):
    name = "counts-padding"
    caught_by = ("KV02",)

    def select(self, view):
        return keep(view, by_norm(view), math.ceil(self.keep_ratio * view.keys.shape[2]))


@dataclass(frozen=True, kw_only=True)
class BudgetOfTheBatch(Ranking):
    """Every sample keeps what the budget allows the largest one."""

    name = "budget-of-the-batch"
    caught_by = ("KV02", "KV10")

    def select(self, view):
        strata = view.decode_strata
        limit = scoring.limits(Budget(keep_ratio=self.keep_ratio), strata)
        return keep(view, by_norm(view), int(limit.max()))


@dataclass(frozen=True, kw_only=True)
class FirstLayerOnly(Ranking):
    name = "first-layer-only"
    caught_by = ("KV02",)

    def select(self, view):
        if view.rank > 0:
            return Decision()
        strata = view.decode_strata
        return keep(view, by_norm(view), scoring.limits(Budget(keep_ratio=self.keep_ratio), strata))


@dataclass(frozen=True, kw_only=True)
class OneMoreInTheLastHead(Ranking):
    """Heads share the budget of the layer, but two or more heads together keep one token too many."""

    name = "one-more-in-the-last-head"
    budget_scope = "layer"
    caught_by = ("KV02",)

    def select(self, view):
        strata = view.decode_strata
        scores = by_norm(view)
        limit = scoring.limits(Budget(keep_ratio=self.keep_ratio), strata)[:, None].expand_as(scores).clone()
        limit[:, 1:] += torch.arange(1, scores.shape[1])[:, None] == scores.shape[1] - 1
        kept = scoring.keep_top(scores, strata, limit, view.visibility)
        return Decision(cache=Selection.from_mask(kept))
