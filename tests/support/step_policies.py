"""Policies that decide in decode steps, for tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import kvprune
from kvprune.policy.step_view import in_order
from kvprune.tokens.selection import Selection


@dataclass(frozen=True, kw_only=True)
class ReadsAll(kvprune.DecodePolicy):
    """Read every entry in each step.

    Args:
        by: How it says so: "none" answers None, "selection" names each entry.
    """

    by: str = "none"
    name = "reads-all"
    compiles = True

    def prepare(self, view):
        return {}

    def attend(self, step, state):
        if self.by == "none":
            return None
        scores = torch.zeros(step.text_rows, 1, step.entries, device=step.keys.device)
        return step.best(scores, step.entries)


@dataclass(frozen=True, kw_only=True)
class ReadsLogits(kvprune.DecodePolicy):
    """Read the entries of the highest logits of this step's own queries, by KV head.

    Args:
        count: How many.
    """

    count: int = 3
    name = "reads-logits"
    compiles = True

    def prepare(self, view):
        return {}

    def attend(self, step, state):
        keys = step.of_rows(step.keys).to(step.grouped_queries().dtype)
        logits = step.grouped_queries() @ keys.transpose(-1, -2)  # [N, Hkv, g, K]
        return step.best(logits.amax(2), self.count)


@dataclass(frozen=True, kw_only=True)
class Remembers(kvprune.DecodePolicy):
    """Read the entries that have received most attention so far, and the newest step's number of others.

    Args:
        count: How many entries a step reads.
        least: The width to which the cache shrinks, by one entry a step; None frees nothing.
    """

    count: int = 3
    least: int | None = None
    name = "remembers"

    def prepare(self, view):
        keys = view.keys.double().norm(dim=-1)  # [R, Hkv, K]
        return {"mass": keys / keys.amax(-1, keepdim=True).clamp(min=1e-9)}  # a row without condition has 0

    def attend(self, step, state):
        return step.best(state["mass"], self.count)

    def observe(self, step, attention, state):
        grouped = attention.unflatten(1, (step.heads, -1)).mean(2)  # [N, Hkv, K]
        mass = state["mass"] * 0.5 + grouped.double()
        if self.least is None or step.entries <= self.least:
            return {"mass": mass}, None
        kept = step.best(mass, step.entries - 1)
        return {"mass": mass.gather(-1, kept.indices)}, kept


@dataclass(frozen=True, kw_only=True)
class Hashes(kvprune.DecodePolicy):
    """Read entries that look random and depend on each query so far.

    Args:
        count: How many.
    """

    count: int = 3
    name = "hashes"
    compiles = True

    def prepare(self, view):
        return {"sum": torch.zeros(len(view.keys), dtype=torch.float64, device=view.keys.device)}

    def attend(self, step, state):
        total = state["sum"] + step.queries.double().sum((1, 2))  # [N]
        scores = torch.sin(100 * total[:, None] + 37 * torch.arange(step.entries, device=total.device))
        return step.best(scores[:, None], self.count)

    def observe(self, step, attention, state):
        return {"sum": state["sum"] + step.queries.double().sum((1, 2))}, None


@dataclass(frozen=True, kw_only=True)
class Fixed(kvprune.DecodePolicy):
    """Read the entries whose keys are longest, of those that decoding sees: the same in each step.

    Args:
        keep_ratio: Fraction of entries.
    """

    keep_ratio: float = 0.1
    name = "fixed"
    compiles = True

    def prepare(self, view):
        count = kvprune.Budget(keep_ratio=self.keep_ratio).resolve(view.entries)
        seen = view.layer.visibility.decode  # [R, S]
        seen = (seen | ~seen.any(-1, keepdim=True))[:, None].expand(-1, view.slots.shape[1], -1)
        seen = view.valid & seen.gather(-1, view.arrived)  # [R, H or 1, K]
        lengths = view.keys.double().norm(dim=-1).masked_fill(~seen, -1)  # [R, Hkv, K]
        best = lengths.topk(count, dim=-1)
        chosen = in_order(best.indices, best.values >= 0, view.entries)
        if chosen.valid.all():  # known for all steps: these need no mask
            return {"places": chosen.indices}
        return {"places": chosen.indices, "valid": chosen.valid}

    def attend(self, step, state):
        if "valid" not in state:
            return Selection.full(state["places"], step.entries)
        return Selection.trusted(state["places"], state["valid"], step.entries)


__all__ = ["Fixed", "Hashes", "ReadsAll", "ReadsLogits", "Remembers"]
