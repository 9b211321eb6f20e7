"""What the broken policies share: correct scores, and selections with and without checks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvprune import CrossKVPolicy, Decision, Selection, scoring


def unchecked(indices, valid, columns):
    """Return a selection that no check has seen."""
    selection = object.__new__(Selection)
    for name, value in (("indices", indices), ("valid", valid), ("columns", columns)):
        object.__setattr__(selection, name, value)
    return selection


def by_norm(view):
    """Return correct scores, [B, Hkv, S]."""
    return view.values.double().norm(dim=-1)


def keep(view, scores, limit):
    """Keep the best visible tokens, as many as a number or a tensor [B, S] says."""
    strata = view.decode_strata
    if isinstance(limit, int):
        limit = torch.full_like(strata, limit)
    return Decision(cache=Selection.from_mask(scoring.keep_top(scores, strata, limit, view.visibility)))


def sizes(view):
    """Return the number of tokens that decoding sees, by column, [B, S]."""
    return scoring.stratum_sizes(view.decode_strata)


@dataclass(frozen=True, kw_only=True)
class Ranking(CrossKVPolicy):
    """A policy with a budget that makes its own selections."""

    keep_ratio: float = 0.5

    ranks_tokens = True
