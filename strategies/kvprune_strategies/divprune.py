"""`divprune`: the subset whose members are least alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvprune import FeatureScoringPolicy, FeatureView, scoring


@dataclass(frozen=True, kw_only=True)
class DivPrune(FeatureScoringPolicy):
    """Keep tokens that are far from each other in cosine distance (max-min diversity).

    The first token is the one whose nearest neighbour is farthest; each further one is the token whose
    nearest kept token is farthest, which is within a factor of two of the best smallest distance. The order
    of picking is the ranking. It knows neither the question nor attention, and decides before the first
    cross-attention layer.

    Deviations: works on projected features of a cross-attention model, which enter keys and values, where
    the original prunes a language model's input; equal distances are ordered by position; an image of an
    interleaved chat that only earlier rows see is thinned on its own.
    """

    name: ClassVar[str] = "divprune"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2503.02175 (DivPrune)"
    fidelity: ClassVar[str] = "adapted"
    cost: ClassVar[str] = (
        "S^2 C products once and S C for each token kept, one after another; 16 MiB; no attention weights; "
        "one transfer to the host"
    )
    bibtex: ClassVar[str] = """@misc{divprune2025,
  title = {{DivPrune}: Diversity-based Visual Token Pruning for Large Multimodal Models},
  author = {Alvar, Saeed Ranjbar and others},
  year = {2025},
  eprint = {2503.02175},
  archivePrefix = {arXiv},
}"""

    def score(self, view: FeatureView) -> Tensor:
        """Return minus the place in the order of picking, ``[B, 1, S]``; -S for what is not picked."""
        features, strata = view.features, view.strata
        limit = scoring.limits(self.budget, strata)
        scores = torch.full((view.batch, 1, view.columns), -float(view.columns), device=view.device)
        every = view.visibility.has_several_groups  # the best of each group must not depend on the budget
        for sample, columns in scoring.members(strata):
            count = len(columns) if every else int(limit[sample, columns[0]])
            order = _farthest_first(scoring.Directions(features[sample], columns), count)
            places = torch.arange(count, device=view.device, dtype=scores.dtype)
            scores[sample, 0, columns[order]] = -places
        return scores


def _farthest_first(directions: scoring.Directions, count: int) -> Tensor:
    """Return the positions of ``count`` vectors in the order in which farthest-point sampling picks them."""
    nearest = directions.nearest()  # of the first pick: to any other token
    picked = torch.empty(count, dtype=torch.int64, device=nearest.device)
    taken = torch.zeros_like(nearest, dtype=torch.bool)
    for place in range(count):
        # argmin of equal cosines may be any of them; the first one shall win.
        free = nearest.masked_fill(taken, torch.inf)
        pick = (free == free.amin()).to(torch.uint8).argmax()
        picked[place] = pick
        taken[pick] = True
        alike = directions.cosines(directions.at(pick)[None])[:, 0]
        nearest = alike if place == 0 else torch.maximum(nearest, alike)
    return picked
