"""Gathers the features that a layer receives, and fits masks to its heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvprune.errors import (
    UnsupportedCacheError,
)
from kvprune.tokens.merging import merge_features
from kvprune.tokens.selection import Selection

__all__ = ["gather_features", "to_query_heads"]


def to_query_heads(mask: Tensor, module: Any) -> Tensor:
    """Repeat a mask by KV head ``[B, Hkv, T, K]`` for each query head; one that heads share stays.

    Args:
        mask: ``[B, 1 or Hkv, T, K]``.
        module: The attention module that will use it.

    Raises:
        UnsupportedCacheError: If its attention cannot tell heads apart.
    """
    heads: int = module.num_heads
    if mask.shape[1] == 1:
        return mask
    if module.config._attn_implementation == "flex_attention":
        raise UnsupportedCacheError(
            "heads keep different tokens, but flex attention in transformers applies the mask of the first "
            "head to all of them; use attn_implementation='sdpa', or a policy whose heads share tokens"
        )
    if mask.shape[1] == heads:
        return mask
    return mask.repeat_interleave(heads // mask.shape[1], dim=1)


def gather_features(features: Tensor, received: Selection) -> Tensor:
    """Return the features that a layer receives: those of kept columns, or what was merged into them.

    Args:
        features: ``[B, S, C]``, all that arrive.
        received: What the manager's ``before_layer`` returned, for each row of the batch, ``[B, 1, K]``.
    """
    indices, valid, merge = received.indices[:, 0], received.valid[:, 0], received.merge
    if merge is not None:
        entries = indices.shape[-1]
        features = merge_features(features, merge.into[:, 0], merge.weights[:, 0], entries)
        if not received.is_ragged:
            return features
        # Padding repeats the last entry, as it does where nothing is merged.
        order = torch.arange(entries, device=valid.device)
        indices = torch.minimum(order, valid.sum(-1, keepdim=True) - 1)
    index = indices.to(features.device)[..., None].expand(-1, -1, features.shape[-1])
    return torch.gather(features, 1, index)
