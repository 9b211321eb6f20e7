"""`topv`: tokens that can stand for many others, by optimal transport over features and places."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from kvprune import FeatureScoringPolicy, FeatureView, scoring
from kvprune.errors import PolicyOptionError


@dataclass(frozen=True, kw_only=True)
class TopV(FeatureScoringPolicy):
    """Keep the tokens from which a transport plan moves most mass, and some of the others evenly.

    Every token of an image is a source, and a target that receives the mass 1. Moving mass from source i to
    another target j costs alpha * (distance of their features) + beta * (how far apart they lie) + gamma *
    (how far i lies from the centre of the image). Each target draws its mass from all other tokens in
    proportion to exp(-cost / epsilon). The importance of a source is what all targets draw from it. A share
    of the budget goes to evenly spaced tokens among the less important ones. It knows neither the question
    nor attention, and decides before the first cross-attention layer.

    Args:
        alpha: Weight of the distance between features, which are scaled to length 1.
        beta: Weight of 1 - exp(-d^2 / (2 sigma^2)), d being the distance in patches.
        gamma: Weight of the distance from the image's centre to the source, 1 in the corners.
        sigma: Width of the spatial term, in patches.
        epsilon: Temperature: a small one lets each target draw from its cheapest sources only.
        recover: Share of the budget for tokens spaced evenly in reading order, in [0, 1).
        class_tokens: Class tokens have no place. With "rank", they have the highest spatial costs and compete
            with the others; with "keep", they come before all others.
    """

    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 0.1
    sigma: float = 10.0
    epsilon: float = 0.1
    recover: float = 0.1
    class_tokens: Literal["rank", "keep"] = "rank"

    name = "topv"
    version = 1

    def score(self, view: FeatureView) -> Tensor:
        """Return the rank by importance in (0, 1), plus 1 if kept, plus 1 if the best of its image."""
        strata = view.strata  # [B, S]
        importance = self.importance(view)[:, None]  # [B, 1, S]
        if self.class_tokens == "keep" and view.layout.class_tokens is not None:
            importance = importance + view.columns * view.layout.class_tokens[:, None]
        limit = scoring.limits(self.budget, strata)  # [B, S]
        share = Fraction(str(self.recover))
        back = limit * share.numerator // share.denominator  # [B, S]
        return scoring.share_evenly(importance, view.visibility, strata, limit, back)[0]

    def importance(self, view: FeatureView) -> Tensor:
        """Return what the targets of its image draw from each source, relative to the mean, ``[B, S]``."""
        found = torch.zeros(view.batch, view.columns, dtype=torch.float32, device=view.device)
        if view.features.dtype == torch.float64:
            found = found.double()
        places = view.places.expand(view.batch, -1, -1)  # [B, S, 2]
        images = view.images.expand(view.batch, -1)  # [B, S]
        inside = torch.where(view.strata >= 0, images, -1)  # [B, S]
        for sample, columns in scoring.members(inside):  # columns: [n]
            directions = scoring.Directions(view.features[sample], columns)
            found[sample, columns] = self._drawn(directions, places[sample, columns].to(found.dtype))
        return found

    def _drawn(self, directions: scoring.Directions, places: Tensor) -> Tensor:
        """Return the mass drawn from each of n sources by n targets of mass 1, ``[n]``; places ``[n, 2]``."""
        nowhere = places[:, 0] < 0  # [n]
        fixed = self.gamma * _from_centre(places, nowhere)  # [n]
        drawn = torch.zeros_like(fixed)
        for rows, targets in directions.blocks():  # m targets at a time
            cost = (2 - 2 * directions.cosines(targets)).clamp_(min=0).sqrt_().mul_(self.alpha)  # [n, m]
            far = torch.cdist(places, places[rows]).square_().div_(-2 * self.sigma**2).exp_().neg_().add_(1)
            far.masked_fill_(nowhere[:, None] | nowhere[rows], 1)
            cost.add_(far, alpha=self.beta).add_(fixed[:, None])
            if len(directions) > 1:  # or each would draw most from itself
                cost.diagonal(-rows.start).fill_(math.inf)
            drawn += cost.mul_(-1 / self.epsilon).softmax(0).sum(1)
        return drawn

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta", "gamma"):
            if getattr(self, name) < 0:
                raise PolicyOptionError(
                    f"{name} weighs a cost and is at least 0, got {getattr(self, name)!r}"
                )
        for name in ("sigma", "epsilon"):
            if getattr(self, name) <= 0:
                raise PolicyOptionError(f"{name} is a positive number, got {getattr(self, name)!r}")
        if not 0 <= self.recover < 1:
            raise PolicyOptionError(f"recover is a share of the budget in [0, 1), got {self.recover!r}")

    fidelity = "inspired-by"
    paper = "arXiv 2503.18278 (TopV)"
    deviations = """
    The paper's source and target are the input and the normalised input of an early layer of a language
    model. Image tokens do not run through the text layers here, so both are the projected features. The
    paper's constants could not be verified; these are ours. The paper solves the transport by Sinkhorn
    iterations. We read it as semi-relaxed: only what targets receive is fixed, which has this closed form. If
    the sources' totals were fixed as well, all sources would have the same importance.
    """
    cost = "S^2 C products once; 24 MiB; no attention weights; one transfer to the host"
    bibtex = """@misc{topv2025,
  title = {{TopV}: Compatible Token Pruning with Inference Time Optimization for Fast and Low-Memory
           Multimodal Vision Language Model},
  author = {Yang, Cheng and others},
  year = {2025},
  eprint = {2503.18278},
  archivePrefix = {arXiv},
}"""


def _from_centre(places: Tensor, nowhere: Tensor) -> Tensor:
    """Return each place's distance from the centre of all, ``[n]``: 1 in the corners and for no place."""
    if bool(nowhere.all()):
        return torch.ones_like(places[:, 0])
    inside = places[~nowhere]  # [m, 2]
    low, high = inside.amin(0), inside.amax(0)  # [2], [2]
    reach = (high - low).square().sum().sqrt() / 2
    distance = (places - (low + high) / 2).square().sum(-1).sqrt()  # [n]
    return torch.where(nowhere, 1, torch.where(reach > 0, distance / reach, 0))
