"""Encoder-decoder models that keep encoder states in an ``EncoderDecoderCache`` (BART, Whisper, ...).

All of them share one pattern: the first decoder call projects the encoder states and fills
``cross_attention_cache``; a flag per layer says so; later calls get the full encoder states and the full
mask again, and read the cache. So a family is a declaration: which module attends, and what it calls its
arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache

from kvprune.adapters.base import (
    ModelAdapter,
    Probe,
    gather_features,
    named_arguments,
    probe_cache,
    probe_signatures,
    to_query_heads,
)
from kvprune.cache import CrossKVLayer, open_layer, require_cache
from kvprune.errors import UnsupportedCacheError
from kvprune.manager import CrossKVManager
from kvprune.seeding import fingerprint
from kvprune.visibility import Visibility

__all__ = ["BartAdapter", "EncoderDecoderAdapter", "WhisperAdapter"]


class EncoderDecoderAdapter(ModelAdapter):
    """What the families have in common; a subclass declares the rest.

    Class attributes:
        modeling_module: Dotted name of the modeling file, for `probe`.
        attention_class: Class of the cross-attention module, for `probe`.
        attention: Attribute of a decoder layer that holds it.
        states: Its argument for encoder states.
        mask: Its argument for the attention mask.
        query: Its attribute that projects queries, ``[B, T, Hq * D]``.
    """

    modeling_module: ClassVar[str]
    attention_class: ClassVar[str]
    attention: ClassVar[str] = "encoder_attn"
    states: ClassVar[str] = "key_value_states"
    mask: ClassVar[str] = "attention_mask"
    query: ClassVar[str] = "q_proj"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._encoder: Any = model.get_encoder()  # type: ignore[operator]
        self._decoder: Any = model.get_decoder()  # type: ignore[operator]
        self._manager: CrossKVManager | None = None
        self._encoded: Tensor | None = None  # what the encoder read last
        self._queries: Tensor | None = None
        # Masks of one decoder call, keyed by the identity of the slots, which are held beside the mask.
        self._masks: dict[int, tuple[Tensor, Tensor | None]] = {}

    @property
    def layer_indices(self) -> Sequence[int]:
        """All decoder layers: each has a cross-attention."""
        return range(len(self._decoder.layers))

    def attach(self, manager: CrossKVManager) -> None:
        """Hook the encoder's input, the decoder's calls, and each cross-attention module."""
        self._manager = manager
        self.before(self._encoder, self._before_encoder)
        self.before(self._decoder, self._before_decoder)
        self.after(self._decoder, self._after_decoder, always=True)
        for layer in self._decoder.layers:
            attention = getattr(layer, self.attention)
            self.before(attention, self._before_attention)
            self.after(attention, self._after_attention)
            if "queries" in manager.policy.needs:
                self.after(getattr(attention, self.query), self._after_query)

    def detach(self) -> None:
        """Undo `attach`, and let go of what the encoder read."""
        super().detach()
        self._encoded = None

    def _before_encoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = named_arguments(module, args, kwargs)
        ids = named.get("input_ids")
        if ids is not None and named.get("attention_mask") is not None:
            ids = ids * named["attention_mask"]
        source = ids if ids is not None else named.get("input_features", named.get("inputs_embeds"))
        self._encoded = source

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self._manager is not None
        self._masks = {}
        named = named_arguments(module, args, kwargs)
        states, cache = named.get("encoder_hidden_states"), named.get("past_key_values")
        if states is None or (
            isinstance(cache, EncoderDecoderCache) and all(map(cache.is_updated.get, self.layer_indices))
        ):
            return
        batch, columns = states.shape[:2]
        tokens = named["input_ids"] if named.get("input_ids") is not None else named["inputs_embeds"]
        visibility = self._visibility(
            tokens, states, named.get("encoder_attention_mask"), named.get("attention_mask")
        )
        self._manager.begin(visibility, columns, lambda: self._sample_fingerprints(states, batch))

    def _visibility(
        self, tokens: Tensor, states: Tensor, encoder_mask: Tensor | None, decoder_mask: Tensor | None
    ) -> Visibility:
        """All rows see the same columns: unit 0 is what the encoder read, unit 1 is padding."""
        batch, columns = states.shape[:2]
        if encoder_mask is None:
            units = torch.zeros(1, columns, dtype=torch.int64, device=states.device)
        elif encoder_mask.shape == (batch, columns):
            units = (encoder_mask == 0).to(torch.int64)
        else:
            raise UnsupportedCacheError(
                f"the encoder's attention mask is [B, S] = [{batch}, {columns}] here, "
                f"got {list(encoder_mask.shape)}"
            )
        live = torch.ones(batch, tokens.shape[1], dtype=torch.bool, device=states.device)
        if decoder_mask is not None and decoder_mask.ndim == 2:
            live &= decoder_mask[:, -tokens.shape[1] :].to(live.device).bool()
        rows = torch.tensor([True, False], device=states.device).expand(batch, 1, 2)
        return Visibility(
            rows=rows, units=units, images=torch.zeros(2, dtype=torch.int64, device=states.device), live=live
        )

    def _sample_fingerprints(self, states: Tensor, batch: int) -> Tensor:
        """Fingerprints for the decoder's batch, whose samples may be repeated for beams."""
        source = self._encoded
        if source is None or batch % source.shape[0]:  # encoder_outputs that were made elsewhere
            return fingerprint(states)
        return fingerprint(source).repeat_interleave(batch // source.shape[0])

    def _after_decoder(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        assert self._manager is not None
        self._manager.end(completed=output is not None)
        self._queries, self._masks = None, {}

    def _before_attention(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        assert self._manager is not None
        named = named_arguments(module, args, kwargs)
        cache, states = named.get("past_key_values"), named.get(self.states)
        if states is None:
            return None
        if cache is not None and not isinstance(cache, EncoderDecoderCache):
            raise UnsupportedCacheError(
                f"cross-attention of {self.family} is cached in an EncoderDecoderCache, "
                f"got {type(cache).__name__}"
            )
        layer = open_layer(require_cache(cache and cache.cross_attention_cache), module.layer_idx)
        assert cache is not None
        heads = module.num_heads
        if cache.is_updated.get(module.layer_idx):
            mask = self._held_mask(named.get(self.mask), layer.slots, layer.valid, layer.ragged, heads)
            return (), {**named, self.mask: mask}
        received = self._manager.before_layer(module.layer_idx, layer)
        if received is None:
            return None
        mask = self._held_mask(
            named.get(self.mask), received.indices, received.valid, received.is_ragged, heads
        )
        states = gather_features(states, received.indices[:, 0])
        return (), {**named, self.states: states, self.mask: mask}

    def _held_mask(
        self, mask: Tensor | None, slots: Tensor | None, valid: Tensor | None, ragged: bool, heads: int
    ) -> Tensor | None:
        """Cut the stock mask to the columns that are held, keeping its kind (bool, additive or none).

        Args:
            mask: ``[B, 1, T or 1, S]`` or None.
            slots: int64 ``[B, H or 1, K]``; None for all columns.
            valid: bool, same shape.
            ragged: Whether some entry is not valid.
            heads: Number of query heads.
        """
        if slots is None or valid is None:
            return mask
        if id(slots) not in self._masks:
            self._masks[id(slots)] = slots, self._cut(mask, slots, valid, ragged, heads)
        return self._masks[id(slots)][1]

    def _cut(
        self, mask: Tensor | None, slots: Tensor, valid: Tensor, ragged: bool, heads: int
    ) -> Tensor | None:
        if mask is None and not ragged:
            return None
        allowed = valid[:, :, None]
        if mask is None:
            dtype = self._decoder.dtype
            cut = torch.zeros(allowed.shape, dtype=dtype, device=slots.device)
        else:
            batch, kinds = slots.shape[:2]
            index = slots[:, :, None].expand(-1, -1, mask.shape[2], -1)
            cut = mask.expand(batch, kinds, -1, -1).gather(-1, index)
        if cut.dtype == torch.bool:
            cut = cut & allowed
        else:
            cut = cut.masked_fill(~allowed, torch.finfo(cut.dtype).min)
        return to_query_heads(cut, heads)

    def _after_attention(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        manager = self._manager
        assert manager is not None
        if manager.in_prefill:
            layer = kwargs["past_key_values"].cross_attention_cache.layers[module.layer_idx]
            assert isinstance(layer, CrossKVLayer)
            queries = self._queries
            if queries is not None:
                queries = queries.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
            manager.after_layer(
                module.layer_idx,
                layer,
                scaling=module.scaling,
                queries=queries,
                # These families have no key norm: what is cached is what was projected.
                raw_keys=layer.keys if "raw_keys" in manager.policy.needs else None,
            )
        self._queries = None

    def _after_query(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        if self._manager is not None and self._manager.in_prefill:
            self._queries = output

    @classmethod
    def probe(cls) -> list[Probe]:
        """Check the names that the declaration and the hooks rely on."""
        cache = EncoderDecoderCache.__init__.__code__.co_names
        missing = [name for name in ("is_updated", "cross_attention_cache") if name not in cache]
        detail = f"lacks {', '.join(missing)}" if missing else "has is_updated and cross_attention_cache"
        return [
            probe_cache(),
            Probe("EncoderDecoderCache", not missing, detail),
            *probe_signatures(
                cls.modeling_module, {cls.attention_class: (cls.states, cls.mask, "past_key_values")}
            ),
        ]


class BartAdapter(EncoderDecoderAdapter):
    """BART."""

    family = "BART"
    model_classes = ("BartForConditionalGeneration", "BartModel")
    modeling_module = "transformers.models.bart.modeling_bart"
    attention_class = "BartAttention"


class WhisperAdapter(EncoderDecoderAdapter):
    """Whisper, whose encoder columns are audio frames."""

    family = "Whisper"
    model_classes = ("WhisperForConditionalGeneration", "WhisperModel")
    modeling_module = "transformers.models.whisper.modeling_whisper"
    attention_class = "WhisperAttention"
