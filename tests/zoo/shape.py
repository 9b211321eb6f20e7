"""KV01: malformed answers, and errors instead of answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvprune import CrossKVPolicy, Decision, ScoringPolicy, Selection
from zoo.helpers import by_norm, keep, unchecked


@dataclass(frozen=True, kw_only=True)
class Unsorted(CrossKVPolicy):
    name = "unsorted"
    caught_by = ("KV01",)

    def select(self, view):
        every = Selection.all(view.keys.shape[0], view.keys.shape[2])
        return Decision(cache=unchecked(every.indices.flip(-1), every.valid, every.columns))


@dataclass(frozen=True, kw_only=True)
class Duplicates(CrossKVPolicy):
    name = "duplicates"
    caught_by = ("KV01",)

    def select(self, view):
        indices = torch.zeros(view.keys.shape[0], 1, 2, dtype=torch.int64)
        return Decision(cache=unchecked(indices, torch.ones_like(indices).bool(), view.keys.shape[2]))


@dataclass(frozen=True, kw_only=True)
class WrongDtype(CrossKVPolicy):
    name = "wrong-dtype"
    caught_by = ("KV01",)

    def select(self, view):
        every = Selection.all(view.keys.shape[0], view.keys.shape[2])
        return Decision(cache=unchecked(every.indices.int(), every.valid, every.columns))


@dataclass(frozen=True, kw_only=True)
class LoosePadding(CrossKVPolicy):
    name = "loose-padding"
    caught_by = ("KV01",)

    def select(self, view):
        right = keep(view, by_norm(view), 1).cache
        indices = torch.cat([right.indices, torch.zeros_like(right.indices)], -1)
        valid = torch.cat([right.valid, torch.zeros_like(right.valid)], -1)
        return Decision(cache=unchecked(indices, valid, right.columns))


@dataclass(frozen=True, kw_only=True)
class OneHeadTooMany(CrossKVPolicy):
    name = "one-head-too-many"
    caught_by = ("KV01",)

    def select(self, view):
        batch, heads, columns, _ = view.keys.shape
        return Decision(cache=Selection.from_mask(torch.ones(batch, heads + 1, columns).bool()))


@dataclass(frozen=True, kw_only=True)
class ForeignColumns(CrossKVPolicy):
    name = "foreign-columns"
    caught_by = ("KV01",)

    def select(self, view):
        batch, _, columns, _ = view.keys.shape
        return Decision(cache=Selection.all(batch, columns + 1))


@dataclass(frozen=True, kw_only=True)
class NoDecision(CrossKVPolicy):
    name = "no-decision"
    caught_by = ("KV01",)

    def select(self, view):
        return Selection.all(view.keys.shape[0], view.keys.shape[2])


@dataclass(frozen=True, kw_only=True)
class OnwardByHead(CrossKVPolicy):
    name = "onward-by-head"
    caught_by = ("KV01",)

    def select(self, view):
        batch, heads, columns, _ = view.keys.shape
        decision = Decision()
        if heads > 1:
            by_head = Selection.from_mask(torch.ones(batch, heads, columns).bool())
            object.__setattr__(decision, "onward", by_head)
        return decision


@dataclass(frozen=True, kw_only=True)
class NanScores(ScoringPolicy):
    name = "nan-scores"
    caught_by = ("KV01",)

    def score(self, view):
        norms = view.values.float().norm(dim=-1)
        return norms / norms.amax(-1, keepdim=True)  # 0 / 0 where all values are zero


@dataclass(frozen=True, kw_only=True)
class ScoresWithoutHeads(ScoringPolicy):
    name = "scores-without-heads"
    caught_by = ("KV01",)

    def score(self, view):
        return view.values.float().norm(dim=-1).mean(1)


@dataclass(frozen=True, kw_only=True)
class NoBfloat16(ScoringPolicy):
    name = "no-bfloat16"
    caught_by = ("KV01",)

    def score(self, view):
        return torch.from_numpy(view.values.numpy()).norm(dim=-1)  # numpy has no bfloat16


@dataclass(frozen=True, kw_only=True)
class NeedsFourColumns(ScoringPolicy):
    name = "needs-four-columns"
    caught_by = ("KV01",)

    def score(self, view):
        best = by_norm(view).topk(4, dim=-1).indices  # an image may have fewer
        return torch.zeros(view.keys.shape[:3]).scatter_(-1, best, 1.0)


@dataclass(frozen=True, kw_only=True)
class OnlyContiguous(ScoringPolicy):
    name = "only-contiguous"
    caught_by = ("KV01",)

    def score(self, view):
        batch, heads, columns, width = view.keys.shape
        return view.values.view(batch * heads, columns, width).norm(dim=-1).view(batch, heads, columns)


@dataclass(frozen=True, kw_only=True)
class UndeclaredQueries(ScoringPolicy):
    name = "undeclared-queries"
    caught_by = ("KV01",)

    def score(self, view):
        return view.attention_mass().unflatten(1, (view.keys.shape[1], -1)).sum(2)
