"""Fits the text's attention mask to a pruned text cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvprune.cache.reader import Reader
from kvprune.cache.text_layer import TextKVLayer
from kvprune.errors import UnsupportedCacheError

__all__ = ["fit_text_mask"]


def fit_text_mask(cache: Any, mask: Tensor | None, batch: int, length: int, reader: Reader) -> Tensor | None:
    """Return the text mask with its part over pruned text replaced, and tell the cache layers about it.

    Transformers treats held entries as the last tokens before the next one, and slices their part out of the
    mask. Here this part is overwritten: zero at entries that are padding of a ragged selection.

    Args:
        cache: The cache of the call; None if there is none.
        mask: ``[B, tokens so far]``, zero at padding; None without padding.
        batch: Rows B of the call.
        length: Text rows T of the call.
        reader: Who fits the mask.

    Raises:
        UnsupportedCacheError: If text was pruned, and the mask does not cover the whole conversation.
    """
    layers = [layer for layer in getattr(cache, "layers", ()) if isinstance(layer, TextKVLayer)]
    for layer in layers:
        layer.announce(reader)
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
            "text was pruned, so attention_mask must cover the whole conversation, [B, tokens] = "
            f"[{batch}, {tokens}] here, got {list(mask.shape)}"
        )
    first = pruned.seen - pruned.held  # token that transformers takes for the first held entry
    mask = mask.clone()
    mask[:, first : first + pruned.kept_width] = pruned.valid.to(mask.device)
    return mask
