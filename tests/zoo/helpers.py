"""What the broken policies share: making selections, rightly and wrongly."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvprune import CrossKVPolicy, Decision, Selection, scoring


def unchecked(indices, valid, columns):
    """A selection made behind the back of all checks."""
    selection = object.__new__(Selection)
    for name, value in (("indices", indices), ("valid", valid), ("columns", columns)):
        object.__setattr__(selection, name, value)
    return selection


def by_norm(view):
    """Sound scores, [B, Hkv, S]."""
    return view.values.double().norm(dim=-1)


def keep(view, scores, limit):
    """Keep as many of the best visible tokens as a number, or a tensor [B, S], says."""
    strata = view.decode_strata
    if isinstance(limit, int):
        limit = torch.full_like(strata, limit)
    return Decision(cache=Selection.from_mask(scoring.keep_top(scores, strata, limit, view.visibility)))


def sizes(view):
    """Number of tokens that decoding sees, by column, [B, S]."""
    return scoring.stratum_sizes(view.decode_strata)


@dataclass(frozen=True, kw_only=True)
class Ranking(CrossKVPolicy):
    """A policy with a budget that does its own selecting."""

    keep_ratio: float = 0.5

    ranks_tokens = True
