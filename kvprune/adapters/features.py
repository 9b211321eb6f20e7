"""Converts between all columns and those that a layer holds: features and attention weights."""

from __future__ import annotations

import torch
from torch import Tensor

from kvprune.adapters.sites import by_query_head
from kvprune.cache.contents import Contents
from kvprune.tokens.merging import merge_features
from kvprune.tokens.replacement import Replacement, among
from kvprune.tokens.selection import Selection

__all__ = ["gather_features", "to_all_columns"]


def gather_features(features: Tensor, received: Selection, replaced: Replacement | None = None) -> Tensor:
    """Return the features of the columns that a layer receives, ``[B, K, C]``, merged if it merges.

    Args:
        features: ``[B, S, C]``, all new columns.
        received: The columns that arrive, for each row of the batch, ``[B, 1, K]``.
        replaced: New tokens, of which those in the received columns' places arrive; None for the encoder's.
    """
    if replaced is not None:
        features, received = replaced.features.to(features.device), among(replaced.places, received)
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


def to_all_columns(weights: Tensor, contents: Contents, columns: int) -> Tensor:
    """Put attention weights over held entries back to their columns, ``[B, Hq, T, S]``; 0 elsewhere.

    Args:
        weights: ``[B, Hq, T, K]``.
        contents: The K entries that the layer attended to.
        columns: Number of columns S.
    """
    slots, valid = contents.slots, contents.valid  # [R, H or 1, K] each
    if slots is None or valid is None:
        return weights
    slots, valid = (held.repeat_interleave(contents.copies, dim=0)[:, :, None] for held in (slots, valid))
    heads = weights.shape[1]
    places = by_query_head(slots, heads).to(weights.device).expand_as(weights)  # [B, Hq, T, K]
    # Padding may name any column, so it adds 0 there.
    weights = weights.masked_fill(~by_query_head(valid, heads).to(weights.device), 0)
    return weights.new_zeros(*weights.shape[:3], columns).scatter_add(-1, places, weights)
