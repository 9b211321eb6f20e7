"""Broken policies that decide in decode steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvprune import DecodePolicy
from kvprune.policy import BudgetPolicy


@dataclass(frozen=True, kw_only=True)
class LeavesOneUnread(BudgetPolicy, DecodePolicy):
    """Reads one entry less than its budget says, wherever there are two."""

    name = "leaves-one-unread"
    caught_by = ("KV16",)

    exact_budget = None

    def prepare(self, view):
        return {}

    def attend(self, step, state):
        scores = torch.arange(step.entries, device=step.keys.device).expand(step.text_rows, 1, -1)
        return step.best(scores.double(), max(1, self.budget.resolve(step.entries) - 1))


@dataclass(frozen=True, kw_only=True)
class LooksAtOtherSamples(DecodePolicy):
    """Ranks entries by the queries of all samples of the batch."""

    name = "looks-at-other-samples"
    caught_by = ("KV17",)

    def prepare(self, view):
        return {}

    def attend(self, step, state):
        shift = 100 * step.queries.sum()
        scores = torch.sin(shift + 7 * torch.arange(step.entries, device=shift.device))
        return step.best(scores.expand(step.text_rows, 1, -1), 2)
