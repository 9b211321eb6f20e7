"""Where a model of an adapter's family attends to encoder states, as far as that can be known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.cache_utils import EncoderDecoderCache

from kvprune.adapters.base import ModelAdapter
from kvprune.adapters.encoder_decoder import EncoderDecoderAdapter
from kvprune.adapters.mllama import MllamaAdapter
from kvprune.testing.conformance.common.results import NotApplicable

__all__ = ["Site", "attention_sites", "cross_layers"]


@dataclass(frozen=True)
class Site:
    """One cross-attention module.

    Attributes:
        layer_idx: Of its decoder layer.
        module: The module.
        states: Its argument for encoder states.
        mask: Its argument for the attention mask.
    """

    layer_idx: int
    module: Any
    states: str
    mask: str


def attention_sites(adapter: type[ModelAdapter], model: Any) -> list[Site]:
    """Return the cross-attention modules of a model.

    Raises:
        NotApplicable: If the adapter does not say where they are.
    """
    if issubclass(adapter, EncoderDecoderAdapter):
        return [
            Site(layer_idx, getattr(layer, adapter.attention), adapter.states, adapter.mask)
            for layer_idx, layer in enumerate(model.get_decoder().layers)
        ]
    if issubclass(adapter, MllamaAdapter):
        text = getattr(model, "model", model).language_model
        return [
            Site(i, text.layers[i].cross_attn, "cross_attention_states", "attention_mask")
            for i in text.config.cross_attention_layers
        ]
    raise NotApplicable(
        f"where {adapter.family} attends is not known; an EncoderDecoderAdapter declares it "
        "(attention, states, mask)"
    )


def cross_layers(layer_indices: Sequence[int], cache: Any) -> dict[int, Any]:
    """Return the cache layers of cross-attention, by layer index."""
    flat = cache.cross_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    return {i: flat.layers[i] for i in layer_indices}
