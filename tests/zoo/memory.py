"""KV10: policies that keep state between calls, or read the clock."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

import torch

from kvprune import Decision, ScoringPolicy
from zoo.helpers import Ranking, by_norm, keep

SEEN = []
CALLS = []


@dataclass(frozen=True, kw_only=True)
class KeepsTheView(ScoringPolicy):
    name = "keeps-the-view"
    caught_by = ("KV10",)

    def score(self, view):
        SEEN[:] = [view]
        return by_norm(view)


@dataclass(frozen=True, kw_only=True)
class KeepsADetachedTensor(ScoringPolicy):
    """Keeps no reference to the view or its tensors, but one to their memory."""

    name = "keeps-a-detached-tensor"
    caught_by = ("KV10",)

    def score(self, view):
        SEEN[:] = [view.keys[0].detach()]
        return by_norm(view)


@dataclass(frozen=True, kw_only=True)
class CountsItsCalls(ScoringPolicy):
    name = "counts-its-calls"
    caught_by = ("KV10",)

    def score(self, view):
        CALLS.append(1)
        return by_norm(view) * (-1) ** len(CALLS)


@dataclass(frozen=True, kw_only=True)
class CachesOnItself(ScoringPolicy):
    name = "caches-on-itself"
    caught_by = ("KV10",)

    @functools.cached_property
    def sign(self):
        return 1.0

    def score(self, view):
        return by_norm(view) * self.sign


@dataclass(frozen=True, kw_only=True)
class RunningMean(ScoringPolicy):
    """Remembers the mean value over samples in an attribute of its class."""

    name = "running-mean"
    caught_by = ("KV10",)

    means = {}  # noqa: RUF012

    def score(self, view):
        before = self.means.get("mean", 0.0)
        self.means["mean"] = 0.5 * before + 0.5 * float(view.values.double().mean())
        return (view.values.double() - before).norm(dim=-1)


@dataclass(frozen=True, kw_only=True)
class LooksAtTheLayerBefore(Ranking):
    """Prunes a layer only if it has seen the layer before it."""

    name = "looks-at-the-layer-before"
    caught_by = ("KV10",)

    last = [-1]  # noqa: RUF012

    def select(self, view):
        in_order = view.rank == self.last[0] + 1
        self.last[0] = view.rank
        return keep(view, by_norm(view), 1) if in_order else Decision()


@dataclass(frozen=True, kw_only=True)
class WallClock(ScoringPolicy):
    """Scores by the hour: the same within a test, but not an hour later."""

    name = "wall-clock"
    caught_by = ("KV10",)

    def score(self, view):
        hour = int(time.time() // 3600)
        return torch.cos(by_norm(view) * hour)
