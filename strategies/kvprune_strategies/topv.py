"""`topv`: tokens that can stand for many others, by optimal transport over features and places."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from kvprune import FeatureScoringPolicy, FeatureView, scoring
from kvprune.errors import PolicyOptionError


@dataclass(frozen=True, kw_only=True)
class TopV(FeatureScoringPolicy):
    """Keep the tokens from which a transport plan moves most mass, and some of the others evenly.

    Every token of an image is a source and a target of mass. Moving mass from source i to target j costs
    alpha * (distance of their features) + beta * (how far apart they lie) + gamma * (how far i lies from the
    centre of the image). Sinkhorn iterations find a plan. The importance of a source is the mass that the
    plan moves from it. A share of the budget goes to evenly spaced tokens among the less important ones. It
    knows neither the question nor attention, and decides before the first cross-attention layer. Audio frames
    and text tokens lie on a line: distances are along it, and its middle is the centre. Models are refused
    where nobody knows where tokens lie.

    Nobody could check which choices the paper makes, and they decide the result (see Deviations). So they are
    options, and a result of this policy says nothing about the paper. The defaults are those of a public
    third-party port, except ``last`` and ``recover``.

    Args:
        alpha: Weight of the distance between features.
        beta: Weight of 1 - exp(-d^2 / (2 sigma^2)), d being the distance in patches.
        gamma: Weight of the distance from the image's centre to the source, 1 in the corners.
        sigma: Width of the spatial term, in patches.
        epsilon: Temperature: a small one lets each target draw from its cheapest sources only.
        recover: Share of the budget for tokens spaced evenly in reading order, in [0, 1).
        marginals: How much mass each token has as a source and as a target. "norm": in proportion to the
            length of its features. "uniform": all the same. "free": all the same as a target; as a source,
            whatever the targets draw from it.
        last: Whose masses each Sinkhorn iteration meets last, so that they hold exactly at the end. With
            "targets", the importance of a source is near to its own mass, and the few iterations leave the
            difference. With "sources", as in the port, it is its own mass whatever the costs are: the length
            of its features, or with ``marginals=uniform`` the same for all, so that position decides.
        steps: Sinkhorn iterations, at least 1. The paper has 3.
        features: "raw", or "unit": scaled to length 1 before distances are measured.
        square: Whether the distance of features is squared.
        scale: Whether each image's distances of features, and its spatial terms, are divided by the largest.
        diagonal: Whether a token may move mass to itself, which costs least.
        class_tokens: Class tokens have no place, and neither has a text beside an image. They have the
            highest spatial costs. With "rank", class tokens compete with the others; with "keep", they come
            before all others.
    """

    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 0.01
    sigma: float = 10.0
    epsilon: float = 0.1
    recover: float = 0.1
    marginals: Literal["norm", "uniform", "free"] = "norm"
    last: Literal["targets", "sources"] = "targets"
    steps: int = 3
    features: Literal["raw", "unit"] = "raw"
    square: bool = True
    scale: bool = True
    diagonal: bool = True
    class_tokens: Literal["rank", "keep"] = "rank"

    name = "topv"
    version = 3
    presets = MappingProxyType({"port": {"last": "sources", "recover": 0.2}})

    def score(self, view: FeatureView) -> Tensor:
        """Return the rank by importance in (0, 1), plus 1 if kept, plus 1 if the best of its image."""
        strata = view.strata  # [B, S]
        importance = self.importance(view)[:, None]  # [B, 1, S]
        first = view.class_tokens if self.class_tokens == "keep" else None
        if first is not None:
            importance = importance + view.columns * first[:, None]
        limit = scoring.limits(self.budget, strata)  # [B, S]
        share = Fraction(str(self.recover))
        back = limit * share.numerator // share.denominator  # [B, S]
        return scoring.share_evenly(importance, view.visibility, strata, limit, back)[0]

    def importance(self, view: FeatureView) -> Tensor:
        """Return what each source gives in its image's plan, relative to the mean, ``[B, S]``."""
        found = torch.zeros(view.batch, view.columns, dtype=torch.float32, device=view.device)
        if view.features.dtype == torch.float64:
            found = found.double()
        places = view.places.expand(view.batch, -1, -1)  # [B, S, 2]
        images = view.images.expand(view.batch, -1)  # [B, S]
        inside = torch.where(view.strata >= 0, images, -1)  # [B, S]
        for sample, columns in scoring.members(inside):  # columns: [n]
            directions = scoring.Directions(view.features[sample], columns)
            given = self._given(directions, places[sample, columns].to(found.dtype))  # [n]
            found[sample, columns] = given * len(columns)
        return found

    def _given(self, directions: scoring.Directions, places: Tensor) -> Tensor:
        """Return the mass that each of n sources gives, ``[n]``, 1 in total; places ``[n, 2]``."""
        equal = torch.full_like(directions.lengths, 1 / len(directions))  # [n]
        if self.marginals == "norm":
            total = directions.lengths.sum()
            masses = torch.where(total > 0, directions.lengths / total, equal)
        else:
            masses = equal
        if self.last == "sources" and self.marginals != "free":
            return masses
        costs = _Costs(self, directions, places)
        sources = None if self.marginals == "free" else masses
        return scoring.sinkhorn_given(costs.blocks, sources, masses, self.epsilon, self.steps)

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
        if self.steps < 1:
            raise PolicyOptionError(f"steps counts Sinkhorn iterations, at least 1, got {self.steps!r}")
        if not 0 <= self.recover < 1:
            raise PolicyOptionError(f"recover is a share of the budget in [0, 1), got {self.recover!r}")

    fidelity = "inspired-by"
    paper = "arXiv 2503.18278 (TopV)"
    deviations = """
    The authors published no code, and only summaries of the paper could be read. These name three costs (L2
    distance of features, Gaussian distance in space, distance from the centre), Sinkhorn with 3 iterations,
    and even recovery. Marginals, constants, scales and the order of the iterations could not be verified, and
    they decide the result. Word error rates of Whisper base on five utterances of read speech at a quarter of
    the tokens (full cache 0.03): version 1 of this policy 0.03, ``marginals=free`` 0.14, ``last=sources``
    2.1, ``marginals=uniform`` 2.2, the default 3.0, ``steps=1`` 4.1; above 1 are endless repetitions. Version
    1 is ``marginals=free``, ``features=unit``, ``square=false``, ``scale=false``, ``diagonal=false``,
    ``gamma=0.1``.

    The defaults follow a public third-party port, except in two things. In the port each iteration ends with
    the sources, so that importance is the length of features; ``preset=port`` does that. And it recovers
    every fourth dropped token in addition to its budget, where ``recover`` is a share of the budget, so that
    a larger budget keeps a superset. In grids of even width, its centre is the left end of the middle row.

    The paper's source and target are the input and the normalised input of an early layer of a language
    model. Image tokens do not run through the text layers here, so both are the projected features.
    """
    differs = (
        "marginals, scales, constants and order of steps could not be verified, and they decide the result"
    )
    checked_against = "unverified: no code of the authors; same sets as a third-party port without recovery"
    cost = (
        "S^2 C products, twice and once more for each step (last=sources: none); 24 MiB; no attention "
        "weights; one transfer to the host"
    )
    bibtex = """@misc{topv2025,
  title = {{TopV}: Compatible Token Pruning with Inference Time Optimization for Fast and Low-Memory
           Multimodal Vision Language Model},
  author = {Yang, Cheng and others},
  year = {2025},
  eprint = {2503.18278},
  archivePrefix = {arXiv},
}"""


class _Costs:
    """What it costs to move mass between the n tokens of one image, some targets at a time."""

    def __init__(self, policy: TopV, directions: scoring.Directions, places: Tensor) -> None:
        self._policy, self._directions, self._places = policy, directions, places
        self._nowhere = places[:, 0] < 0  # [n]
        self._lengths = directions.lengths if policy.features == "raw" else torch.ones_like(places[:, 0])
        self._fixed = policy.gamma * _from_centre(places, self._nowhere)  # [n], of each source
        self._largest = places.new_ones(2)  # of the distances of features, and of the spatial terms
        if policy.scale:
            found = [
                torch.stack([x.amax() for x in self._distances(*block)]) for block in directions.blocks()
            ]
            largest = torch.stack(found).amax(0)
            self._largest = torch.where(largest > 0, largest, 1)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of targets and what moving mass to them costs, ``[n, m]``, which may be written to."""
        policy, weights = self._policy, (self._policy.alpha, self._policy.beta)
        for rows, targets in self._directions.blocks():
            feature, far = self._distances(rows, targets)
            cost = feature.mul_(weights[0] / self._largest[0]).add_(far.mul_(weights[1] / self._largest[1]))
            cost.add_(self._fixed[:, None])
            if not policy.diagonal and len(self._directions) > 1:
                cost.diagonal(-rows.start).fill_(math.inf)
            yield rows, cost

    def _distances(self, rows: slice, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distances of features and the spatial terms of m targets, both ``[n, m]``."""
        lengths, places = self._lengths, self._places
        feature = self._directions.cosines(targets).mul_(-2 * lengths[:, None]).mul_(lengths[rows])
        feature.add_(lengths[:, None].square()).add_(lengths[rows].square()).clamp_(min=0)
        feature.diagonal(-rows.start).zero_()  # without rounding
        if not self._policy.square:
            feature.sqrt_()
        far = (
            torch.cdist(places, places[rows]).square_().div_(-2 * self._policy.sigma**2).exp_().neg_().add_(1)
        )
        far.masked_fill_(self._nowhere[:, None] | self._nowhere[rows], 1)
        return feature, far


def _from_centre(places: Tensor, nowhere: Tensor) -> Tensor:
    """Return each place's distance from the centre of all, ``[n]``: 1 in the corners and for no place."""
    if bool(nowhere.all()):
        return torch.ones_like(places[:, 0])
    inside = places[~nowhere]  # [m, 2]
    low, high = inside.amin(0), inside.amax(0)  # [2], [2]
    reach = (high - low).square().sum().sqrt() / 2
    distance = (places - (low + high) / 2).square().sum(-1).sqrt()  # [n]
    return torch.where(nowhere, 1, torch.where(reach > 0, distance / reach, 0))
