"""Views of drawn queries and keys, for published procedures that rank tokens by attention.

Authors' code attends from text to the whole prompt. It was run on prompts whose text keys get no attention
(one more coordinate of queries and keys takes it away), so its softmax runs over image tokens only, as in
cross-attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from helpers import make_view, make_visibility
from published import draw

from kvprune import LayerView

__all__ = ["layer_view"]


def layer_view(problem: Mapping[str, Any], layer: int = 0, **fields: Any) -> LayerView:
    """Return one sample's view of a cross-attention layer, in float32.

    Args:
        problem: ``seed`` (or ``layer_seeds``, one for each layer), ``columns`` (S), ``rows`` (T),
            ``query_heads``, ``kv_heads``, ``width`` (D), ``scaling``, and ``gain``, a factor on all queries
            or one for each query head.
        layer: The layer's number.
        fields: Other fields of the view.
    """
    seed = problem["layer_seeds"][layer] if "layer_seeds" in problem else problem["seed"]
    gain = torch.tensor(problem["gain"]).view(-1, 1, 1)
    queries = draw(seed, problem["query_heads"], problem["rows"], problem["width"]) * gain
    keys = draw(seed + 500, problem["kv_heads"], problem["columns"], problem["width"])
    return make_view(
        make_visibility([[[1]] * problem["rows"]], problem["columns"]),
        keys=keys[None],
        values=keys[None],
        captured_queries=queries[None],
        captured_raw_keys=keys[None],
        scaling=problem["scaling"],
        rank=layer,
        **fields,
    )
