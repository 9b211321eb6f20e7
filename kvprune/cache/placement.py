"""Which caches of transformers may hold our layers, and how ours takes the place of theirs.

Ours holds cross-attention only; the layers of text stay what they are. So a static or quantized cache works:
text is held as the user asked, and what is kept of the image in a `CrossKVLayer`, whose size is fixed once
prefill is over. What cannot be right is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Self, TypeGuard

from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    EncoderDecoderCache,
    StaticLayer,
)

from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.cache.text_layer import TextKVLayer
from kvprune.errors import UnsupportedCacheError

__all__ = [
    "OneCrossLayer",
    "OneLayer",
    "open_for_prefill",
    "open_layer",
    "open_text_layer",
    "require_cache",
]


class OneLayer(Cache):
    """What one cross-attention layer reads instead of the whole cache, for one call.

    Args:
        layer_idx: Index of the layer.
        keys: ``[B, Hkv, K, D]``.
        values: Likewise.
    """

    def __init__(self, layer_idx: int, keys: Tensor, values: Tensor) -> None:
        self.layers = {layer_idx: SimpleNamespace(keys=keys, values=values)}  # type: ignore[assignment]
        self._entries = keys.shape[-2]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of entries: older releases ask whether there are any."""
        return self._entries

    @classmethod
    def spread(cls, layer_idx: int, layer: CrossKVLayer) -> Self:
        """Return what a layer holds, in its own dtype, with a row for each row of the batch.

        The layer itself stays as it is; what is returned is dropped after the call.
        """
        return cls(layer_idx, *layer.spread())


class OneCrossLayer(EncoderDecoderCache):
    """The same for encoder-decoder models.

    Args:
        layer_idx: Index of the layer.
        keys: ``[B, Hkv, K, D]``.
        values: Likewise.
    """

    def __init__(self, layer_idx: int, keys: Tensor, values: Tensor) -> None:
        self.cross_attention_cache = OneLayer(layer_idx, keys, values)  # type: ignore[assignment]
        self.is_updated = {layer_idx: True}


def require_cache(cache: object) -> Cache:
    """Return the cache, or raise because it is none that could hold our layers.

    Raises:
        UnsupportedCacheError: If it is no cache of transformers, or offloads its layers.
    """
    if not isinstance(cache, Cache):
        raise UnsupportedCacheError(
            f"kvprune knows the caches of transformers (DynamicCache), got {type(cache).__name__}"
        )
    if cache.offloading:
        raise UnsupportedCacheError(
            f"{type(cache).__name__} offloads its layers, which transformers does not do correctly for "
            "cross-attention: decoding reads image keys and values without waiting for them. Use the default "
            "DynamicCache, or cache_implementation='static'"
        )
    return cache


def open_layer(cache: Cache, layer_idx: int) -> CrossKVLayer:
    """Return our layer at an index of a cache, taking the place of one of transformers.

    Raises:
        UnsupportedCacheError: If the layer there is of a kind that we cannot replace (sliding, unknown), or
            holds what we cannot read (a static or quantized layer that was filled without kvprune).
    """
    while len(cache.layers) <= layer_idx:  # DynamicCache() without a config grows as it is used
        if cache.layer_class_to_replicate is None:
            raise UnsupportedCacheError(
                f"{type(cache).__name__} has {len(cache.layers)} layers, but layer {layer_idx} is a "
                "cross-attention layer; build the cache from the model's config"
            )
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[layer_idx]
    if isinstance(layer, CrossKVLayer):
        return layer
    if type(layer) is DynamicLayer:
        ours = CrossKVLayer.adopt(layer)
    elif type(layer) is StaticLayer or _is_quantized(layer):
        if int(layer.get_seq_length()):  # prefill only: waiting for the device is fine
            raise UnsupportedCacheError(
                f"{type(cache).__name__} holds a {type(layer).__name__} at cross-attention layer {layer_idx} "
                "that was filled before the compression began; start with an empty cache"
            )
        ours = CrossKVLayer()
    else:
        raise UnsupportedCacheError(
            f"{type(cache).__name__} holds a {type(layer).__name__} at cross-attention layer {layer_idx}; "
            "kvprune takes the place of dynamic, static and quantized layers: generate with the default cache"
        )
    cache.layers[layer_idx] = ours
    return ours


def open_for_prefill(cache: object, layer_idx: int, warn: Callable[[str], None]) -> CrossKVLayer:
    """Return our layer at an index of a cache into which an image is about to be written.

    Args:
        cache: The cache that holds cross-attention.
        layer_idx: Of the layer.
        warn: Told what a user should know about the layer whose place ours takes.

    Raises:
        UnsupportedCacheError: See `require_cache` and `open_layer`.
    """
    usable = require_cache(cache)
    if layer_idx < len(usable.layers) and _is_quantized(usable.layers[layer_idx]):
        warn(
            "quantized cache: text is quantized, kept image tokens are held in the model's own precision "
            "(stock transformers loses the image here)"
        )
    return open_layer(usable, layer_idx)


def open_text_layer(cache: Cache, layer_idx: int) -> TextKVLayer:
    """Return our layer for pruned text at an index of a cache, taking the place of one of transformers.

    Raises:
        UnsupportedCacheError: If the layer there is no dynamic one: what others hold cannot be dropped.
    """
    layer = cache.layers[layer_idx]
    if isinstance(layer, TextKVLayer):
        return layer
    if type(layer) is not DynamicLayer:
        raise UnsupportedCacheError(
            f"{type(cache).__name__} holds text in a {type(layer).__name__} at layer {layer_idx}, "
            "of which nothing can be dropped; generate with the default DynamicCache, or use a policy that "
            "prunes no text"
        )
    ours = TextKVLayer.adopt(layer)
    cache.layers[layer_idx] = ours
    return ours


def _is_quantized(layer: object) -> TypeGuard[CacheLayerMixin]:
    """Whether a layer quantizes: all of these have one pair of methods, whatever their base is called."""
    return isinstance(layer, CacheLayerMixin) and hasattr(layer, "_dequantize")
