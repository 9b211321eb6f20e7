"""Where a model of an adapter's family attends to encoder states, as far as that can be known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import EncoderDecoderCache

from kvprune.adapters.base import ModelAdapter, Site
from kvprune.errors import UnsupportedModelError
from kvprune.testing.conformance.common.results import NotApplicable

__all__ = ["Site", "attention_sites", "cross_layers"]


def attention_sites(adapter: type[ModelAdapter], model: Any) -> Sequence[Site]:
    """Return the cross-attention modules of a model.

    Raises:
        NotApplicable: If the adapter does not say where they are.
    """
    made = adapter(model)  # a model that does not look as expected is no reason to skip a check
    try:
        return made.sites
    except UnsupportedModelError as error:
        raise NotApplicable(str(error)) from error


def cross_layers(layer_indices: Sequence[int], cache: Any) -> dict[int, Any]:
    """Return the cache layers of cross-attention, by layer index."""
    flat = cache.cross_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    return {i: flat.layers[i] for i in layer_indices}
