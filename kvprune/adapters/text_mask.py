"""The mask over text whose cache was pruned: which of the entries that are held may be attended to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvprune.cache.text_layer import TextKVLayer
from kvprune.errors import UnsupportedCacheError

__all__ = ["fit_text_mask"]


def fit_text_mask(cache: Any, mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """Return the mask over text with what it says about pruned text put right, and tell the cache so.

    Transformers takes entries that are held for the last tokens before the next one, and slices their part
    out of the mask. That part says here which entries only pad.

    Args:
        cache: What the forward call reads, if anything.
        mask: ``[B, tokens so far]``, zero at padding; None where there is none.
        batch: Rows B of the call.
        length: Text rows of the call.

    Raises:
        UnsupportedCacheError: If text was pruned and the mask is none over the whole conversation.
    """
    layers = [layer for layer in getattr(cache, "layers", ()) if isinstance(layer, TextKVLayer)]
    for layer in layers:
        layer.announce()
    pruned = next((layer for layer in layers if layer.slots is not None), None)
    if pruned is None or pruned.valid is None:
        return mask
    tokens = pruned.seen + length
    if mask is None:
        if not pruned.ragged:
            return None
        mask = torch.ones(batch, tokens, dtype=torch.int64, device=pruned.valid.device)
    if mask.ndim != 2 or mask.shape[1] != tokens:
        raise UnsupportedCacheError(
            f"text was pruned, so attention_mask must be [B, tokens] over the whole conversation, "
            f"[{batch}, {tokens}] here, got {list(mask.shape)}"
        )
    first = pruned.seen - pruned.held
    mask = mask.clone()
    mask[:, first : first + pruned.chosen] = pruned.valid.to(mask.device)
    return mask
