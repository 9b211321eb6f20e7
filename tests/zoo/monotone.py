"""KV14: policies that declare `ranks_tokens` although a larger budget drops tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvprune import ScoringPolicy, scoring
from zoo.helpers import by_norm


@dataclass(frozen=True, kw_only=True)
class Stride(ScoringPolicy):
    """Keeps every n-th token, where n depends on the budget."""

    name = "stride"
    caught_by = ("KV14",)

    def score(self, view):
        strata = view.strata
        order = scoring.rank_within(torch.zeros_like(strata, dtype=torch.float32)[:, None], strata)[:, 0]
        kept, size = scoring.limits(self.budget, strata), scoring.stratum_sizes(strata).clamp(min=1)
        return (((order + 1) * kept // size) > (order * kept // size))[:, None].float()


@dataclass(frozen=True, kw_only=True)
class TurnsRound(ScoringPolicy):
    """Keeps high norms at small budgets and low norms at large ones."""

    name = "turns-round"
    caught_by = ("KV14",)

    def score(self, view):
        return by_norm(view) * (1 if (self.keep_ratio or 0) < 0.4 else -1)
