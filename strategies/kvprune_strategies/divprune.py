"""`divprune`: the subset of tokens that are least similar to each other."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from kvprune import FeatureScoringPolicy, FeatureView, scoring


@dataclass(frozen=True, kw_only=True)
class DivPrune(FeatureScoringPolicy):
    """Keep tokens that are far from each other in cosine distance (max-min diversity).

    The first token is the one whose nearest neighbour is farthest; each further one is the token whose
    nearest kept token is farthest. The smallest distance between kept tokens is then at least half of what is
    possible. The order of picking is the ranking. It knows neither the question nor attention, and decides
    before the first cross-attention layer. ``preset=published`` keeps 0.098, as the authors'
    script does.
    """

    name = "divprune"
    version = 2
    presets = MappingProxyType({"published": {"keep_ratio": 0.098}})

    def score(self, view: FeatureView) -> Tensor:
        """Return minus the place in the order of picking, ``[B, 1, S]``; -S for what is not picked."""
        strata = view.strata  # [B, S]
        limit = scoring.limits(self.budget, strata)  # [B, S]
        scores = torch.full((view.batch, 1, view.columns), -float(view.columns), device=view.device)
        every = view.visibility.has_several_groups  # the best of each group must not depend on the budget
        for sample, columns in scoring.members(strata):  # columns: [n]
            count = len(columns) if every else int(limit[sample, columns[0]])
            order = scoring.farthest_first(view.features[sample], columns, count)  # [count]
            places = torch.arange(count, device=view.device, dtype=scores.dtype)
            scores[sample, 0, columns[order]] = -places
        return scores

    fidelity = "adapted"
    paper = "arXiv 2503.02175 (DivPrune)"
    deviations = """
    The original prunes a language model's input; this works on the projected features of a cross-attention
    model, from which keys and values are made. The number of kept tokens is rounded up, where the original
    rounds to the nearest: 57 of 576 tokens at 0.098, not 56. Cosines are computed in float64 and rounded to
    multiples of 2^-40; equal distances are ordered by position, and no token is picked twice. An image of an
    interleaved chat that only earlier rows see is pruned on its own.
    """
    differs = "keep_ratio rounds up where the original rounds; prunes encoder features, not inputs of an LLM"
    checked_against = (
        "same sets, in the same order, as vbdi/divprune@799e2d9 (llava_arch.py, DivPrune) at equal counts"
    )
    cost = (
        "cosines of tokens that may be the most isolated or the next one: on random features about a fifth "
        "of S^2 C products, at worst S^2 C and S C for each token kept; no attention weights; some transfers "
        "to the host for each sample"
    )
    bibtex = """@misc{divprune2025,
  title = {{DivPrune}: Diversity-based Visual Token Pruning for Large Multimodal Models},
  author = {Alvar, Saeed Ranjbar and others},
  year = {2025},
  eprint = {2503.02175},
  archivePrefix = {arXiv},
}"""
