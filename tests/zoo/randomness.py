"""KV10: randomness that view.random() would have done right."""

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
    """Repeats itself, by taking everybody else's randomness away."""

    name = "reseeds-the-world"
    caught_by = ("KV10",)

    def score(self, view):
        torch.manual_seed(view.rank)
        return torch.rand(view.keys.shape[2]).expand(view.keys.shape[0], 1, -1)


@dataclass(frozen=True, kw_only=True)
class ForksTheWorld(ScoringPolicy):
    """Leaves the global generator as it was, and yet draws what it happens to hold."""

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
    """From the right generator, but with a batch axis."""

    name = "draws-for-the-batch"
    caught_by = ("KV10",)

    def score(self, view):
        return torch.rand(view.keys.shape[:3], generator=view.generator)
