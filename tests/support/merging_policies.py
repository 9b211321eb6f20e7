"""Policies that merge in every way there is: per head or not, with weights or means, features or caches."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvprune import Budget, CrossKVPolicy, Decision, FeaturePolicy, scoring
from kvprune.tokens.buckets import merge_mean, merge_weighted, nearest


def top(view, scores, strata, ratio):
    limit = scoring.limits(Budget(keep_ratio=ratio), strata)
    return scoring.keep_top(scores, strata, limit, view.visibility)


@dataclass(frozen=True, kw_only=True)
class MergesCaches(CrossKVPolicy):
    """Keeps the highest values, and merges by image."""

    ratio: float = 0.3
    by_head: bool = True
    weighted: bool = False
    renormalize: bool = False
    bias: bool = False

    name = "merges-caches"

    def select(self, view):
        strata = view.decode_strata
        scores = view.values.double().norm(dim=-1)
        if not self.by_head:
            scores = scores.mean(1, keepdim=True)
        kept = top(view, scores, strata, self.ratio)
        buckets = nearest(kept, view.images.expand_as(strata).masked_fill(strata != 0, -1))
        how = {"renormalize_keys": self.renormalize, "size_bias": self.bias}
        if self.weighted:  # every third column is dropped outright
            third = torch.arange(kept.shape[-1]) % 3 == 0
            buckets = torch.where(third & ~kept, -1, buckets)
            return Decision(cache=merge_weighted(kept, buckets, 0.1 + scores, **how))
        return Decision(cache=merge_mean(kept, buckets, **how))


@dataclass(frozen=True, kw_only=True)
class MergesFeatures(FeaturePolicy):
    """Merges before the first layer; with ``later``, again after it, and then each layer in its cache."""

    ratio: float = 0.5
    later: bool = False
    bias: bool = False

    name = "merges-features"

    @property
    def needs(self):
        return frozenset({"features"})

    def choose(self, view):
        return Decision(onward=self._onward(view, self.ratio))

    def select(self, view):
        if not self.later:
            return Decision()
        cache = MergesCaches(ratio=0.6, bias=self.bias, renormalize=True).select(view).cache
        return Decision(cache=cache, onward=self._onward(view, 0.7) if view.rank == 0 else None)

    def _onward(self, view, ratio):
        scores = view.features.double().norm(dim=-1)[:, None]
        kept = top(view, scores, view.strata, ratio)
        return merge_mean(kept, nearest(kept, view.groups))
