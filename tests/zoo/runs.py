"""What shows only in whole runs: writes, memories of broken calls, rows, empty samples, re-reading."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from kvprune import Budget, Decision, PrefillPolicy, ScoringPolicy, Selection, scoring
from kvprune.engine.manager import CrossKVManager
from zoo.helpers import by_norm

NOTED = []


@dataclass(frozen=True, kw_only=True)
class WritesToEarlierLayers(PrefillPolicy):
    """Halves the keys of all layers but the last, past torch's version counters, when it decides."""

    name = "writes-to-earlier-layers"
    caught_by = ("views",)

    def observe(self, view):
        return None

    def conclude(self, views, observed):
        for view in views[:-1]:
            view.keys.data.mul_(0.5)
        return [Decision() for _ in views]


@dataclass(frozen=True, kw_only=True)
class ForgetsWhenInterrupted(PrefillPolicy):
    """Notes the scores of its layers in a list of its module, which it empties only when it has decided."""

    name = "forgets-when-interrupted"
    caught_by = ("history",)

    keep_ratio: float = 0.5

    ranks_tokens = True

    def observe(self, view):
        NOTED.append(by_norm(view))

    def conclude(self, views, observed):
        decisions = []
        for view, scores in zip(views, NOTED, strict=False):
            limit = scoring.limits(Budget(keep_ratio=self.keep_ratio), view.decode_strata)
            kept = scoring.keep_top(scores, view.decode_strata, limit, view.visibility)
            decisions.append(Decision(cache=Selection.from_mask(kept)))
        NOTED.clear()
        return decisions


@dataclass(frozen=True, kw_only=True)
class SharesEqualInputs(ScoringPolicy):
    """Scores each image once: samples with the same fingerprint get the scores of the first of them."""

    name = "shares-equal-inputs"
    caught_by = ("rows",)

    @property
    def needs(self):
        return frozenset({"queries"})

    def score(self, view):
        scores = scoring.by_kv_head(view.attention_mass(), view.heads)  # [B, Hkv, S]
        prints = view.fingerprints().expand(view.batch).tolist()
        return scores[[prints.index(value) for value in prints]]


@dataclass(frozen=True, kw_only=True)
class NeedsRealText(ScoringPolicy):
    """Weighs tokens by the mean of the text that is no padding: no number if there is none."""

    name = "needs-real-text"
    caught_by = ("padding",)

    @property
    def needs(self):
        return frozenset({"text"})

    def score(self, view):
        real = view.text.real[:, None, :, None]
        mean = (view.text.values * real).sum(2) / real.sum(2)
        return by_norm(view) * (1 + torch.tanh(mean.mean((-1, -2))))[:, None, None]


@dataclass(frozen=True, kw_only=True)
class KeepsMoreIfItIsReadAgain(ScoringPolicy):
    """Looks who is calling, and keeps everything where its first answer token would show what is dropped."""

    name = "keeps-more-if-it-is-read-again"
    caught_by = ("reread",)

    keep_ratio: float = 0.5

    def score(self, view):
        return by_norm(view)

    def select(self, view):
        frame = sys._getframe()
        while frame is not None and not isinstance(frame.f_locals.get("self"), CrossKVManager):
            frame = frame.f_back
        if frame is not None and frame.f_locals["self"].rereads:
            return Decision()
        return super().select(view)
