"""KV10: policies in which samples of a batch influence each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvprune import ScoringPolicy
from zoo.helpers import by_norm


@dataclass(frozen=True, kw_only=True)
class NormalisesOverTheBatch(ScoringPolicy):
    name = "normalises-over-the-batch"
    caught_by = ("KV10",)

    def score(self, view):
        values = view.values.double()
        return (values - values.mean(0, keepdim=True)).norm(dim=-1)


@dataclass(frozen=True, kw_only=True)
class MeasuresFromTheEnd(ScoringPolicy):
    """Prefers the middle of all columns, including columns that only other samples' images need."""

    name = "measures-from-the-end"
    caught_by = ("KV10",)

    def score(self, view):
        columns = torch.arange(view.keys.shape[2], dtype=torch.float64)
        return -(columns - columns.mean()).abs().expand(view.keys.shape[0], 1, -1)


@dataclass(frozen=True, kw_only=True)
class CountsPaddedRows(ScoringPolicy):
    """Scores by the number of text rows, left padding included."""

    name = "counts-padded-rows"
    caught_by = ("KV10",)

    def score(self, view):
        return torch.cos(by_norm(view) * view.live.shape[1])


@dataclass(frozen=True, kw_only=True)
class FirstComesFirst(ScoringPolicy):
    """Scores by a sample's place in the batch."""

    name = "first-comes-first"
    caught_by = ("KV10",)

    def score(self, view):
        place = torch.arange(view.keys.shape[0])[:, None, None]
        return by_norm(view) * (1 - 2 * (place % 2))


@dataclass(frozen=True, kw_only=True)
class LooksAtTheDevice(ScoringPolicy):
    """Scores by the device; only a machine with two devices can show it."""

    name = "looks-at-the-device"

    def score(self, view):
        return by_norm(view) * (-1 if view.keys.is_cuda else 1)
