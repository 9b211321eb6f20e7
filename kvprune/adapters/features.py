"""Converts between all columns and those that a layer holds: features, attention weights, masks by head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvprune.cache.contents import Contents
from kvprune.errors import UnsupportedCacheError
from kvprune.tokens.merging import merge_features
from kvprune.tokens.selection import Selection

__all__ = ["gather_features", "to_all_columns", "to_query_heads"]


def to_query_heads(mask: Tensor, module: Any) -> Tensor:
    """Expand a mask from KV heads to query heads, ``[B, 1 or Hq, T, K]``.

    Args:
        mask: ``[B, 1 or Hkv, T, K]``.
        module: The attention module that will use it.

    Raises:
        UnsupportedCacheError: If its attention implementation supports no mask by head.
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
    """Return the features of the columns that a layer receives, ``[B, K, C]``, merged if it merges.

    Args:
        features: ``[B, S, C]``, all new columns.
        received: The columns that arrive, for each row of the batch, ``[B, 1, K]``.
    """
    indices, valid, merge = received.indices[:, 0], received.valid[:, 0], received.merge
    if merge is not None:
        entries = indices.shape[-1]
        features = merge_features(features, merge.into[:, 0], merge.weights[:, 0], entries)  # [B, K, C]
        if not received.is_ragged:
            return features
        # Padding repeats the last entry, as it does without a merge.
        order = torch.arange(entries, device=valid.device)
        indices = torch.minimum(order, valid.sum(-1, keepdim=True) - 1)
    index = indices.to(features.device)[..., None].expand(-1, -1, features.shape[-1])  # [B, K, C]
    return torch.gather(features, 1, index)


def to_all_columns(weights: Tensor, contents: Contents, columns: int, module: Any) -> Tensor:
    """Put attention weights over held entries back to their columns, ``[B, Hq, T, S]``; 0 elsewhere.

    Args:
        weights: ``[B, Hq, T, K]``.
        contents: The K entries that the layer attended to.
        columns: Number of columns S.
        module: The attention module.
    """
    slots, valid = contents.slots, contents.valid  # [R, H or 1, K] each
    if slots is None or valid is None:
        return weights
    slots, valid = (held.repeat_interleave(contents.copies, dim=0)[:, :, None] for held in (slots, valid))
    places = to_query_heads(slots, module).to(weights.device).expand_as(weights)  # [B, Hq, T, K]
    # Padding may name any column, so it adds 0 there.
    weights = weights.masked_fill(~to_query_heads(valid, module).to(weights.device), 0)
    return weights.new_zeros(*weights.shape[:3], columns).scatter_add(-1, places, weights)
