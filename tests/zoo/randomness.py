"""KV10: random policies that do not draw from `view.random()`."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from kvprune import ScoringPolicy


@dataclass(frozen=True, kw_only=True)
class GlobalRandom(ScoringPolicy):
    name = "global-random"
    caught_by = ("KV10",)

    def score(self, view):
        return torch.rand(view.keys.shape[:3])


@dataclass(frozen=True, kw_only=True)
class ReseedsTheWorld(ScoringPolicy):
    """Seeds the global generator, which changes what all other code draws."""

    name = "reseeds-the-world"
    caught_by = ("KV10",)

    def score(self, view):
        torch.manual_seed(view.rank)
        return torch.rand(view.keys.shape[2]).expand(view.keys.shape[0], 1, -1)


@dataclass(frozen=True, kw_only=True)
class ForksTheWorld(ScoringPolicy):
    """Leaves the global generator unchanged, but its answer depends on the state of it."""

    name = "forks-the-world"
    caught_by = ("KV10",)

    def score(self, view):
        with torch.random.fork_rng():
            return torch.rand(view.keys.shape[2]).expand(view.keys.shape[0], 1, -1)


@dataclass(frozen=True, kw_only=True)
class PythonRandom(ScoringPolicy):
    name = "python-random"
    caught_by = ("KV10",)

    def score(self, view):
        draws = [random.random() for _ in range(view.keys.shape[2])]
        return torch.tensor(draws).expand(view.keys.shape[0], 1, -1)


@dataclass(frozen=True, kw_only=True)
class DrawsForTheBatch(ScoringPolicy):
    """Draws from the right generator, but for the whole batch at once."""

    name = "draws-for-the-batch"
    caught_by = ("KV10",)

    def score(self, view):
        return torch.rand(view.keys.shape[:3], generator=view.generator)
