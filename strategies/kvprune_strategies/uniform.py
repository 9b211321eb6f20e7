"""`uniform`: every n-th visible token, the simplest content-blind baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvprune import LayerView, ScoringPolicy, scoring


@dataclass(frozen=True, kw_only=True)
class Uniform(ScoringPolicy):
    """Keep visible tokens at equal distances in reading order (image, tile, patch row).

    The stride depends on the budget, so a larger budget does not keep a superset (KV14 does not apply).
    """

    name = "uniform"
    version = 1
    ranks_tokens = False

    def score(self, view: LayerView) -> Tensor:
        """Score 1 for the tokens on the stride and 0 for the others, ``[B, 1, S]``."""
        strata = view.strata  # [B, S]
        order = scoring.rank_within(torch.zeros_like(strata, dtype=torch.float32)[:, None], strata)[:, 0]
        kept = scoring.limits(self.budget, strata)  # [B, S]
        size = scoring.stratum_sizes(strata).clamp(min=1)  # [B, S]
        # The i-th of n tokens is on the stride where i * kept / n + 1/2 passes a whole number.
        half = size // 2
        on_stride = ((order + 1) * kept + half) // size > (order * kept + half) // size
        return on_stride[:, None].float()

    cost = "one cumulative sum over columns"
