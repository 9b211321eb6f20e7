"""Captures that only Mllama provides: self-attention of the text, class attention, positions of tiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvprune.adapters.attachment import Attachment
from kvprune.adapters.class_attention import ClassAttention
from kvprune.adapters.text_capture import TextCapture
from kvprune.adapters.text_sites import text_site
from kvprune.cache.placement import open_text_layer
from kvprune.engine.manager import CrossKVManager
from kvprune.errors import UnsupportedModelError
from kvprune.policy.captured import Captured
from kvprune.policy.text_view import TextView
from kvprune.tokens.layout import Layout

__all__ = ["capture_class_attention", "capture_text", "tile_layout"]


def capture_text(
    attachment: Attachment,
    manager: CrossKVManager,
    text: Any,
    cross_layers: Sequence[int],
    mask: Tensor | None,
    *,
    copies: int,
    cached: bool,
) -> None:
    """Hook the self-attention before each cross-attention layer, or every one if text is pruned.

    Args:
        attachment: Removes the hooks when the call ends.
        manager: Receives each captured self-attention.
        text: The language model.
        cross_layers: Indices of its cross-attention layers.
        mask: The attention mask of the call.
        copies: Consecutive rows of the batch that are equal.
        cached: Whether there is a cache.

    Raises:
        UnsupportedModelError: If the policy prunes text, but the first layer is a cross-attention layer.
    """
    prunes = cached and "text_cache" in manager.policy.needs
    if prunes and 0 in cross_layers:
        raise UnsupportedModelError(
            f"policy {manager.policy.name!r} prunes text, but the first layer of this decoder is a "
            "cross-attention layer, from which transformers takes the length of the text; use a policy that "
            "prunes no text"
        )
    sites = {
        layer_idx: text_site(layer_idx, layer.self_attn)
        for layer_idx, layer in enumerate(text.layers)
        if layer_idx not in cross_layers
    }
    # The last self-attention layer before each cross-attention layer; -1 for none.
    before = {max((i for i in sites if i < cross), default=-1) for cross in cross_layers}

    def done(view: TextView, cache: Cache | None) -> None:
        layer = open_text_layer(cache, view.layer_idx) if prunes and cache is not None else None
        manager.after_text(view, layer)

    capture = TextCapture(manager.policy.name, done, sites, mask, copies)
    capture.hook(attachment, set(sites) if prunes else before - {-1}, cached=cached)


def capture_class_attention(
    attachment: Attachment,
    policy_name: str,
    vision: Any,
    layer: tuple[str, int],
    named: Mapping[str, Any],
    copies: int,
) -> Callable[[], Captured] | None:
    """Hook the class attention of the vision tower; return a function that reads it after the tower has run.

    Args:
        attachment: Removes the hooks when the call ends.
        policy_name: For messages.
        vision: The vision tower.
        layer: The encoder in it, and the layer in that encoder.
        named: Arguments of the forward call by name.
        copies: Consecutive rows of the batch that are equal.

    Raises:
        UnsupportedModelError: If the vision tower does not run in this call.
    """
    ratios, tiles = named.get("aspect_ratio_ids"), named.get("aspect_ratio_mask")
    if named.get("pixel_values") is None:
        raise UnsupportedModelError(
            f"policy {policy_name!r} needs view.class_attention, which the vision tower computes, but the "
            "tower does not run if cross_attention_states are passed; pass pixel_values, "
            "aspect_ratio_ids and aspect_ratio_mask instead"
        )
    if ratios is None or tiles is None:
        return None  # the model itself raises an error
    encoder, number = layer
    attention = ClassAttention(
        policy_name,
        getattr(vision, encoder).layers[number].self_attn,
        vision.num_patches,
        (ratios > 0)[..., None] & tiles.bool(),
        copies,
    )
    attention.hook(attachment)
    return lambda: Captured(class_attention=attention.by_column())


def tile_layout(vision: Any, named: Mapping[str, Any], copies: int) -> Callable[[], Layout] | None:
    """Return a function that computes the positions of the new columns in their images; None if unknown.

    Args:
        vision: The vision tower.
        named: Arguments of the forward call by name.
        copies: Consecutive rows of the batch that are equal.
    """
    ratios, tiles = named.get("aspect_ratio_ids"), named.get("aspect_ratio_mask")
    if ratios is None:
        return None
    grid = vision.image_size // vision.patch_size

    def layout() -> Layout:
        # Pairs of height and width, in tiles. Ids count from 1; 0 means no image.
        supported = vision.config.supported_aspect_ratios
        widths = torch.tensor([0, *(width for _, width in supported)], device=ratios.device)
        return Layout.tiles(
            grid,
            widths[ratios[::copies]],
            vision.max_num_tiles,
            class_token=True,
            exists=None if tiles is None else tiles[::copies].bool(),
        )

    return layout
