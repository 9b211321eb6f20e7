"""Cross-attention layers drawn from a seed, for cases whose published procedure reads queries and keys.

The problem of such a case has ``seed``, ``rows``, ``columns``, ``query_heads``, ``kv_heads``, ``width`` and
``sharpness``: a factor on the logits of each layer, which also says how many layers there are.
"""

from __future__ import annotations

from typing import Any

import torch
from helpers import make_view, make_visibility
from published import draw

from kvprune import LayerView
from kvprune.policy import PrefillPolicy
from kvprune.policy.base import CrossKVPolicy

__all__ = ["attention", "keys_of", "queries_of", "selections", "values_of", "views"]

DTYPE = torch.float64


def queries_of(problem: dict[str, Any], layer: int) -> torch.Tensor:
    """Queries of a layer, ``[1, Hq, T, D]``."""
    shape = (1, problem["query_heads"], problem["rows"], problem["width"])
    return problem["sharpness"][layer] * draw(100 * problem["seed"] + 3 * layer, *shape, dtype=DTYPE)


def keys_of(problem: dict[str, Any], layer: int) -> torch.Tensor:
    """Keys of a layer, ``[1, Hkv, S, D]``."""
    shape = (1, problem["kv_heads"], problem["columns"], problem["width"])
    return draw(100 * problem["seed"] + 3 * layer + 1, *shape, dtype=DTYPE)


def values_of(problem: dict[str, Any], layer: int) -> torch.Tensor:
    """Values of a layer, ``[1, Hkv, S, D]``."""
    shape = (1, problem["kv_heads"], problem["columns"], problem["width"])
    return draw(100 * problem["seed"] + 3 * layer + 2, *shape, dtype=DTYPE)


def attention(problem: dict[str, Any], layer: int) -> torch.Tensor:
    """Attention weights of a layer, ``[1, Hq, T, S]``, as plain matrix products and a softmax."""
    group = problem["query_heads"] // problem["kv_heads"]
    keys = keys_of(problem, layer).repeat_interleave(group, dim=1)  # [1, Hq, S, D]
    logits = queries_of(problem, layer) @ keys.mT * problem["width"] ** -0.5
    return logits.softmax(-1)


def views(problem: dict[str, Any]) -> list[LayerView]:
    """Views of all layers, in order."""
    visibility = make_visibility([[[1]] * problem["rows"]], problem["columns"])
    return [
        make_view(
            visibility,
            width=problem["width"],
            rank=layer,
            num_layers=len(problem["sharpness"]),
            keys=keys_of(problem, layer),
            values=values_of(problem, layer),
            captured_queries=queries_of(problem, layer),
        )
        for layer in range(len(problem["sharpness"]))
    ]


def selections(policy: CrossKVPolicy, layers: list[LayerView]) -> list[list[list[int]]]:
    """What a policy keeps of one sample, as a recording has it: layer, head, columns."""
    if isinstance(policy, PrefillPolicy):
        decisions = policy.conclude(layers, [policy.observe(view) for view in layers])
    else:
        decisions = [policy.select(view) for view in layers]
    masks = []  # each [H, S]
    for view, decision in zip(layers, decisions, strict=True):
        whole = torch.ones(view.heads, view.columns, dtype=torch.bool)
        masks.append(whole if decision.cache is None else decision.cache.to_mask()[0])
    return [[head.nonzero().squeeze(1).tolist() for head in mask] for mask in masks]
