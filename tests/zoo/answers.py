"""KV06: policies that change an earlier answer. The engine keeps copies, so nothing else fails."""

from __future__ import annotations

from dataclasses import dataclass

from kvprune import CrossKVPolicy, Decision, Selection, scoring

GIVEN = {}


def everything_else(view):
    """Pass on half of the visible columns, and one of each group, to later layers."""
    scores = scoring.pool_heads(view.values.double().norm(dim=-1))
    half = (scoring.stratum_sizes(view.strata) + 1) // 2
    return Decision(onward=Selection.from_mask(scoring.keep_top(scores, view.strata, half, view.visibility)))


@dataclass(frozen=True, kw_only=True)
class MutatesItsAnswer(CrossKVPolicy):
    """Writes other columns into the selection that later layers already use."""

    name = "mutates-its-answer"
    caught_by = ("KV06",)

    def select(self, view):
        if view.rank == 0:
            GIVEN["answer"] = everything_else(view)
            return GIVEN["answer"]
        if view.rank == 1 and "answer" in GIVEN:
            indices = GIVEN["answer"].onward.indices
            indices.copy_((indices + 1).clamp(max=GIVEN["answer"].onward.columns - 1))
        return Decision()


@dataclass(frozen=True, kw_only=True)
class ZeroesItsAnswer(CrossKVPolicy):
    """Replaces all columns that later layers use with column 0."""

    name = "zeroes-its-answer"
    caught_by = ("KV06",)

    def select(self, view):
        if view.rank == 0:
            GIVEN["zeroed"] = everything_else(view)
            return GIVEN["zeroed"]
        if view.rank == 1 and "zeroed" in GIVEN:
            GIVEN["zeroed"].onward.indices.zero_()
        return Decision()


@dataclass(frozen=True, kw_only=True)
class ShrinksItsAnswer(CrossKVPolicy):
    """Shortens the selection that later layers use, after their mask was made."""

    name = "shrinks-its-answer"
    caught_by = ("KV06",)

    def select(self, view):
        if view.rank == 0:
            GIVEN["shrinking"] = everything_else(view)
            return GIVEN["shrinking"]
        if view.rank == 1 and "shrinking" in GIVEN:
            onward = GIVEN["shrinking"].onward
            for tensor in (onward.indices, onward.valid):
                tensor.set_(tensor[..., :1].clone())
        return Decision()
