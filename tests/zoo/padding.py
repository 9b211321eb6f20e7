"""KV04: policies that ignore visibility."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvprune import CrossKVPolicy, Decision, Selection, onward_decision, scoring
from zoo.helpers import by_norm


@dataclass(frozen=True, kw_only=True)
class KeepsPadding(CrossKVPolicy):
    """Keeps the higher half of all norms, and the best token of each visibility group."""

    name = "keeps-padding"
    caught_by = ("KV04",)

    def select(self, view):
        norms = by_norm(view).mean(1, keepdim=True)
        kept = norms >= norms.median(-1, keepdim=True).values
        kept |= (scoring.rank_within(norms, view.groups) == 0) & (view.groups >= 0)[:, None]
        return Decision(cache=Selection.from_mask(kept))


@dataclass(frozen=True, kw_only=True)
class KeepsMissing(CrossKVPolicy):
    """Keeps the last columns, whether they exist or not."""

    name = "keeps-missing"
    caught_by = ("KV04",)

    def select(self, view):
        batch, _, columns, _ = view.keys.shape
        kept = (torch.arange(columns) >= columns // 2).expand(batch, 1, columns)
        return Decision(cache=Selection.from_mask(kept))


@dataclass(frozen=True, kw_only=True)
class PassesPaddingOn(CrossKVPolicy):
    """Passes every other column on to later layers, padding included."""

    name = "passes-padding-on"
    caught_by = ("KV04",)

    def select(self, view):
        if view.rank > 0:
            return Decision()
        batch, _, columns, _ = view.keys.shape
        kept = (torch.arange(columns) % 2 == 0).expand(batch, 1, columns)
        return onward_decision(view, kept, crop_here=False)
