"""KV15: policies that merge unrelated tokens, or lose mass."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from kvprune import Budget, CrossKVPolicy, Decision, scoring
from kvprune.tokens.buckets import merge_mean, nearest
from zoo.helpers import by_norm, unchecked


def merging(view, cells):
    """Keep half of the visible tokens, and merge each other one into the nearest in its cell, [B, S]."""
    strata = view.decode_strata
    scores = by_norm(view).mean(1, keepdim=True)
    limit = scoring.limits(Budget(keep_ratio=0.5), strata)
    kept = scoring.keep_top(scores, strata, limit, view.visibility)
    return merge_mean(kept, nearest(kept, cells))


def soundly(view):
    """Merge correctly: seen tokens only, within their image."""
    return merging(view, view.images.expand_as(view.strata).masked_fill(view.strata != 0, -1))


def altered(selection, **parts):
    """Return the selection with another merge that no check has seen."""
    made = unchecked(selection.indices, selection.valid, selection.columns)
    object.__setattr__(made, "merge", dataclasses.replace(selection.merge, **parts))
    return made


@dataclass(frozen=True, kw_only=True)
class MergesAcrossImages(CrossKVPolicy):
    name = "merges-across-images"
    caught_by = ("KV15",)

    def select(self, view):
        return Decision(cache=merging(view, view.decode_strata))


@dataclass(frozen=True, kw_only=True)
class MergesPadding(CrossKVPolicy):
    """Merges padding tiles as well, because they belong to the same image."""

    name = "merges-padding"
    caught_by = ("KV15",)

    def select(self, view):
        return Decision(cache=merging(view, view.images.expand_as(view.strata)))


@dataclass(frozen=True, kw_only=True)
class MergesIntoTheNext(CrossKVPolicy):
    """Counts entries from one: kept columns go into the next entry, and the last one into none."""

    name = "merges-into-the-next"
    caught_by = ("KV15",)

    def select(self, view):
        selection = soundly(view)
        into = selection.merge.into
        return Decision(cache=altered(selection, into=torch.where(into < 0, into, into + 1)))


@dataclass(frozen=True, kw_only=True)
class DividesByZero(CrossKVPolicy):
    """Weighs columns by a number that may be zero."""

    name = "divides-by-zero"
    caught_by = ("KV15",)

    def select(self, view):
        selection = soundly(view)
        weights = 1 / (selection.merge.into != 0).double()
        return Decision(cache=altered(selection, weights=weights))


@dataclass(frozen=True, kw_only=True)
class BiasesFeatures(CrossKVPolicy):
    """Asks for a bias of logits in a merge of features."""

    name = "biases-features"
    caught_by = ("KV15",)

    def select(self, view):
        selection = soundly(view)
        if view.rank > 0:
            return Decision()
        return Decision(onward=altered(selection, size_bias=True))


@dataclass(frozen=True, kw_only=True)
class MergesAndWrites(CrossKVPolicy):
    """Subtracts one from all values in place, before it merges."""

    name = "merges-and-writes"
    caught_by = ("KV15", "KV10", "KV13")

    def select(self, view):
        selection = soundly(view)
        view.values.sub_(1)
        return Decision(cache=selection)
