"""Replaces cross-attention layers of a transformers cache by `CrossKVLayer`, and refuses unsupported caches.

Text layers are not replaced, unless a policy prunes text. So static and quantized caches work: text is held
as the user asked, and the image in a `CrossKVLayer`, whose size is fixed after prefill. A cache that would
give wrong results is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
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
from kvprune.cache.reader import Reader
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


class _Sides:
    """Keys and values, in a class that torch.compile can trace."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values


class OneLayer(Cache):
    """A cache with the keys and values of one cross-attention layer, passed to it instead of the whole cache.

    Args:
        layer_idx: Index of the decoder layer.
        keys: ``[B, Hkv, K, D]``.
        values: ``[B, Hkv, K, D]``.
    """

    def __init__(self, layer_idx: int, keys: Tensor, values: Tensor) -> None:
        self.layers = {layer_idx: _Sides(keys, values)}  # type: ignore[assignment]
        self._entries = keys.shape[-2]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of entries; older releases check that it is not 0."""
        return self._entries

    @classmethod
    def spread(cls, layer_idx: int, layer: CrossKVLayer) -> Self:
        """Return a cache with a layer's keys and values in its own dtype, for each row of the batch.

        The layer itself does not change.
        """
        return cls(layer_idx, *layer.spread())


class OneCrossLayer(EncoderDecoderCache):
    """The same as `OneLayer`, for encoder-decoder models.

    Args:
        layer_idx: Index of the decoder layer.
        keys: ``[B, Hkv, K, D]``.
        values: ``[B, Hkv, K, D]``.
        text: The self-attention cache, from which some decoders take the length of the text.
    """

    def __init__(self, layer_idx: int, keys: Tensor, values: Tensor, text: Cache) -> None:
        self.self_attention_cache = text  # type: ignore[assignment]
        self.cross_attention_cache = OneLayer(layer_idx, keys, values)  # type: ignore[assignment]
        self.is_updated = {layer_idx: True}


def require_cache(cache: object) -> Cache:
    """Return the cache, or raise if it cannot hold a `CrossKVLayer`.

    Raises:
        UnsupportedCacheError: If it is not a cache of transformers, or offloads its layers.
    """
    if not isinstance(cache, Cache):
        raise UnsupportedCacheError(
            f"kvprune supports caches of transformers, such as DynamicCache, got {type(cache).__name__}"
        )
    if cache.offloading:
        raise UnsupportedCacheError(
            f"{type(cache).__name__} offloads its layers, which transformers does not do correctly for "
            "cross-attention: decoding reads image keys and values without waiting for them. Use the default "
            "DynamicCache, or cache_implementation='static'"
        )
    return cache


def open_layer(cache: Cache, layer_idx: int, reader: Reader | None = None) -> CrossKVLayer:
    """Return the `CrossKVLayer` at an index of a cache; replace a layer of transformers if there is none.

    Args:
        cache: The cache that holds cross-attention.
        layer_idx: Index of the decoder layer.
        reader: Who cuts masks to what the layer holds, from now on.

    Raises:
        UnsupportedCacheError: If the layer there cannot be replaced (sliding, unknown), or cannot be read (a
            static or quantized layer that was filled without kvprune).
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
        layer.reader = reader
        return layer
    if type(layer) is DynamicLayer:
        ours = CrossKVLayer.adopt(layer)
    elif type(layer) is StaticLayer or _is_quantized(layer):
        if int(layer.get_seq_length()):  # a device transfer, in prefill only
            raise UnsupportedCacheError(
                f"{type(cache).__name__} holds a {type(layer).__name__} at cross-attention layer {layer_idx} "
                "that was filled before the compression began; start with an empty cache"
            )
        ours = CrossKVLayer()
    else:
        raise UnsupportedCacheError(
            f"{type(cache).__name__} holds a {type(layer).__name__} at cross-attention layer {layer_idx}; "
            "kvprune can replace only dynamic, static and quantized layers; generate with the default cache"
        )
    ours.reader = reader
    cache.layers[layer_idx] = ours
    return ours


def open_for_prefill(
    cache: object, layer_idx: int, warn: Callable[[str], None], reader: Reader | None = None
) -> CrossKVLayer:
    """Return the `CrossKVLayer` at an index of a cache, before new columns are written to it.

    Args:
        cache: The cache that holds cross-attention.
        layer_idx: Index of the decoder layer.
        warn: Called with a warning for the user if a quantized layer is replaced.
        reader: Who cuts masks to what the layer holds, from now on.

    Raises:
        UnsupportedCacheError: See `require_cache` and `open_layer`.
    """
    usable = require_cache(cache)
    if layer_idx < len(usable.layers) and _is_quantized(usable.layers[layer_idx]):
        warn(
            "quantized cache: text is quantized, kept image tokens are held in the model's own precision "
            "(stock transformers loses the image here)"
        )
    return open_layer(usable, layer_idx, reader)


def open_text_layer(cache: Cache, layer_idx: int) -> TextKVLayer:
    """Return the `TextKVLayer` at an index of a cache; replace a layer of transformers if there is none.

    Raises:
        UnsupportedCacheError: If the layer there is not dynamic; entries of other kinds cannot be dropped.
    """
    layer = cache.layers[layer_idx]
    if isinstance(layer, TextKVLayer):
        return layer
    if type(layer) is not DynamicLayer:
        raise UnsupportedCacheError(
            f"{type(cache).__name__} holds text in a {type(layer).__name__} at layer {layer_idx}, "
            "from which no token can be dropped; generate with the default DynamicCache, or use a policy "
            "that prunes no text"
        )
    ours = TextKVLayer.adopt(layer)
    cache.layers[layer_idx] = ours
    return ours


def _is_quantized(layer: object) -> TypeGuard[CacheLayerMixin]:
    """Whether a layer quantizes: such layers have this method, whatever the name of their base class."""
    return isinstance(layer, CacheLayerMixin) and hasattr(layer, "_dequantize")
