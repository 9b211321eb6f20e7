"""KV03 and KV05: samples, images or text rows without any kept token."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvprune import CrossKVPolicy, Decision, Selection, onward_decision
from zoo.helpers import Ranking, by_norm, unchecked


@dataclass(frozen=True, kw_only=True)
class KeepsNothing(CrossKVPolicy):
    name = "keeps-nothing"
    caught_by = ("KV03", "KV05")

    def select(self, view):
        every = Selection.all(view.keys.shape[0], view.keys.shape[2])
        return Decision(cache=unchecked(every.indices * 0, ~every.valid, every.columns))


@dataclass(frozen=True, kw_only=True)
class RefusedEmptyMask(CrossKVPolicy):
    name = "refused-empty-mask"
    caught_by = ("KV01", "KV03")

    def select(self, view):
        kept = (by_norm(view) > 1e9) & view.visible[:, None]
        return Decision(cache=Selection.from_mask(kept))


@dataclass(frozen=True, kw_only=True)
class StarvesAnImage(Ranking):
    """Keeps the best token of all images together, so that some images have none."""

    name = "starves-an-image"
    caught_by = ("KV03",)

    def select(self, view):
        seen = view.strata == 0
        best = by_norm(view).masked_fill(~seen[:, None], -1).argmax(-1, keepdim=True)
        kept = torch.zeros(view.keys.shape[:3], dtype=torch.bool).scatter_(-1, best, True)
        return Decision(cache=Selection.from_mask(kept))


@dataclass(frozen=True, kw_only=True)
class StarvesARow(CrossKVPolicy):
    """Passes on only what decoding sees, so that rows about an earlier image see nothing in prefill."""

    name = "starves-a-row"
    caught_by = ("KV05", "KV03")

    def select(self, view):
        if view.rank > 0:
            return Decision()
        return onward_decision(view, (view.strata == 0)[:, None])
