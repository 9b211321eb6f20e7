"""KV09, KV10, KV11, KV13: policies that write to the tensors of their view."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvprune import CrossKVPolicy, Decision, ScoringPolicy
from zoo.helpers import by_norm


@dataclass(frozen=True, kw_only=True)
class NormalisesKeysInPlace(ScoringPolicy):
    name = "normalises-keys-in-place"
    caught_by = ("KV10", "KV13")

    def score(self, view):
        view.keys.div_(view.keys.norm(dim=-1, keepdim=True).clamp(min=1e-3))
        return view.keys.float().sum(-1)


@dataclass(frozen=True, kw_only=True)
class SortsTheCache(CrossKVPolicy):
    """Sorts the cached keys and values by norm, which does not change what decoding computes."""

    name = "sorts-the-cache"
    caught_by = ("KV09", "KV10", "KV11")

    def select(self, view):
        order = by_norm(view).argsort(-1)[..., None].expand_as(view.keys)
        view.keys.copy_(view.keys.gather(2, order))
        view.values.copy_(view.values.gather(2, order))
        return Decision()


@dataclass(frozen=True, kw_only=True)
class RollsTheValues(CrossKVPolicy):
    name = "rolls-the-values"
    caught_by = ("KV09", "KV11", "KV13")

    def select(self, view):
        view.values.copy_(view.values.roll(1, dims=2))
        return Decision()


@dataclass(frozen=True, kw_only=True)
class WritesVisibility(ScoringPolicy):
    """Marks text before the image as live."""

    name = "writes-visibility"
    caught_by = ("KV10",)

    def score(self, view):
        view.live[:] = True
        return by_norm(view)


@dataclass(frozen=True, kw_only=True)
class WritesGroups(ScoringPolicy):
    """Writes to a tensor that is computed from visibility and cached with it."""

    name = "writes-groups"
    caught_by = ("KV10",)

    def score(self, view):
        view.groups.clamp_(min=0)
        return by_norm(view)


@dataclass(frozen=True, kw_only=True)
class WritesAndRestores(ScoringPolicy):
    """Halves the values while it scores, which other threads would see."""

    name = "writes-and-restores"
    caught_by = ("KV10",)

    def score(self, view):
        view.values.mul_(0.5)
        scores = by_norm(view)
        view.values.mul_(2)
        return scores


@dataclass(frozen=True, kw_only=True)
class DoublesTheValues(CrossKVPolicy):
    name = "doubles-the-values"
    caught_by = ("KV13",)

    def select(self, view):
        with torch.no_grad():
            view.values.mul_(2)
        return Decision()


@dataclass(frozen=True, kw_only=True)
class WritesTheText(ScoringPolicy):
    """Changes the text's keys in place, and so what decoding reads."""

    name = "writes-the-text"
    caught_by = ("KV10", "KV13")

    @property
    def needs(self):
        return frozenset({"text"})

    def score(self, view):
        view.text.keys.add_(1)
        return by_norm(view)
