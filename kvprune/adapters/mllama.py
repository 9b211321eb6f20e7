"""Llama-3.2-Vision (class Mllama in transformers).

Image features are projected to keys and values in a few decoder layers and cached in the ordinary flat
cache. Columns are image-major, then tile, then patch, so the unit of visibility is the tile of an image.

The hooks, in the order in which they run in a forward call (`docs/hooks.md` has the picture):

1. before the whole model: how many rows at the end are draft tokens;
2. before ``MllamaModel``: keep the raw mask from being expanded to one column per patch, and begin a prefill
   if an image comes along;
3. before each cross-attention layer: put our cache layer in place, pass on only features that survived,
   and give it a mask as wide as what it holds;
4. after each cross-attention layer in prefill: the manager decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

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

__all__ = ["MllamaAdapter"]


@dataclass
class _Call:
    """What one forward call of the model says about masks; shared by its layers."""

    rows: Tensor | None  # bool [B, T, U]: which tiles each text row may attend; None without a mask
    patches: int  # columns per tile
    dtype: torch.dtype
    row_mask: Tensor | None = field(init=False)  # [B, 1, T, 1], gates the MLP branch of rows that see no tile
    bias: Tensor | None = field(init=False)  # additive mask by tile, [B, T, U]
    # Keyed by the identity of the slots, which are held beside the mask so that no identity is used twice.
    masks: dict[int, tuple[Tensor | None, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.row_mask = self.bias = None
        if self.rows is not None:
            sees = self.rows.any(-1, keepdim=True)
            self.row_mask = sees[:, None].to(self.dtype)
            # In stock transformers a row that sees nothing attends to everything; here, to all that is held.
            bias = torch.zeros(self.rows.shape, dtype=self.dtype, device=self.rows.device)
            self.bias = bias.masked_fill_(sees & ~self.rows, torch.finfo(self.dtype).min)

    def attention_mask(
        self, slots: Tensor | None, valid: Tensor | None, ragged: bool, heads: int
    ) -> Tensor | None:
        """Additive mask over held columns, ``[B, 1 or heads, T, K]``; the same for layers that hold the same.

        Args:
            slots: int64 ``[B, H or 1, K]``, the columns held; None for all.
            valid: bool, same shape.
            ragged: Whether some entry is not valid.
            heads: Number of query heads.
        """
        if self.bias is None and not ragged:
            return None
        if id(slots) not in self.masks:
            self.masks[id(slots)] = slots, to_query_heads(self._mask(slots, valid, ragged), heads)
        return self.masks[id(slots)][1]

    def _mask(self, slots: Tensor | None, valid: Tensor | None, ragged: bool) -> Tensor:
        """Additive mask over held columns by KV head, ``[B, H or 1, T, K]``."""
        if slots is None or valid is None:
            assert self.bias is not None
            return self.bias[:, None, :, :, None].expand(*[-1] * 4, self.patches).flatten(3)
        if self.bias is None:
            mask = torch.zeros_like(valid, dtype=self.dtype)[:, :, None]
        else:
            tiles = (slots // self.patches).to(self.bias.device)[:, :, None]
            by_head = self.bias[:, None].expand(-1, tiles.shape[1], -1, -1)
            mask = by_head.gather(-1, tiles.expand(-1, -1, by_head.shape[2], -1))
        if ragged:
            mask = mask.masked_fill(~valid[:, :, None].to(mask.device), torch.finfo(self.dtype).min)
        return mask


class MllamaAdapter(ModelAdapter):
    """``MllamaForConditionalGeneration`` and ``MllamaModel``."""

    family = "Llama-3.2-Vision (Mllama)"
    model_classes = ("MllamaForConditionalGeneration", "MllamaModel")

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        # The outer model holds the inner one as `.model`; the inner one holds vision and language models.
        self._inner = cast(Any, model if hasattr(model, "language_model") else model.get_submodule("model"))
        self._text = cast(Any, self._inner.language_model)
        self._layer_indices: list[int] = sorted(self._text.config.cross_attention_layers)
        self._drafts = 0
        self._call: _Call | None = None
        self._queries: Tensor | None = None
        self._raw_keys: Tensor | None = None
        self._manager: CrossKVManager | None = None

    @property
    def layer_indices(self) -> Sequence[int]:
        """Indices of the cross-attention layers (3, 8, 13, ... in Llama-3.2-11B-Vision)."""
        return self._layer_indices

    def attach(self, manager: CrossKVManager) -> None:
        """Hook the model's forward calls (see the head of this file)."""
        self._manager = manager
        if self._inner is not self.model:
            self.before(self.model, self._before_outer)
        self.before(self._inner, self._before_inner)
        self.after(self._inner, self._after_inner, always=True)
        for layer_idx in self._layer_indices:
            layer = self._text.layers[layer_idx]
            self.before(layer, self._before_layer)
            # Without it, SDPA takes a missing mask to mean causal attention over image columns.
            self.override(layer.cross_attn, "is_causal", False)

    def _hook_prefill(self, needs: frozenset[str]) -> None:
        """Add the hooks that only prefill needs: decoding, which runs for each token, does without them."""
        for layer_idx in self._layer_indices:
            layer = self._text.layers[layer_idx]
            self.after(layer, self._after_layer, for_one_call=True)
            if "queries" in needs:
                self.after(layer.cross_attn.q_norm, self._after_q_norm, for_one_call=True)
            if "raw_keys" in needs:
                self.before(layer.cross_attn.k_norm, self._before_k_norm, for_one_call=True)

    def _before_outer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep = named_arguments(module, args, kwargs).get("logits_to_keep", 0)
        # Assisted decoding verifies draft tokens: it asks for their logits and for one more.
        self._drafts = keep - 1 if isinstance(keep, int) and keep > 1 else 0

    def _before_inner(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = named_arguments(module, args, kwargs)
        drafts, self._drafts = self._drafts, 0
        mask = named.get("cross_attention_mask")
        tokens = named["input_ids"] if named.get("input_ids") is not None else named.get("inputs_embeds")
        if tokens is None:
            return args, kwargs  # the model itself says what is missing
        batch, length = tokens.shape[:2]
        patches = self._inner.vision_model.num_patches
        rows = None if mask is None else self._rows(mask, length, named.get("past_key_values"))
        # The dtype of one weight: asking the model for its dtype walks over all of them.
        self._call = _Call(rows, patches, self._text.embed_tokens.weight.dtype)
        pixels, states = named.get("pixel_values"), named.get("cross_attention_states")
        if pixels is not None or states is not None:
            if named.get("past_key_values") is not None:
                require_cache(named["past_key_values"])  # refuse before any layer has run
            self._begin(batch, length, drafts, pixels, states, named.get("attention_mask"))
        # Named now, so that positional arguments and the mask's removal go together.
        return (), {**named, "cross_attention_mask": None}

    def _rows(self, mask: Tensor, length: int, cache: Any) -> Tensor:
        """Return which tile of which image each of the ``length`` rows may attend, bool ``[B, T, U]``."""
        if mask.ndim != 4:
            raise UnsupportedCacheError(
                "cross_attention_mask is [B, T, images, tiles] as the processor makes it, "
                f"got {list(mask.shape)}"
            )
        if mask.shape[1] != length:  # a plain forward call may pass the rows of the whole conversation
            seen = int(cache.get_seq_length()) if cache is not None else 0
            missing = seen + length - mask.shape[1]
            if missing > 0:  # draft tokens in older releases; new rows repeat the last one, as in generate
                mask = torch.cat([mask, mask[:, -1:].expand(-1, missing, -1, -1)], dim=1)
            mask = mask[:, seen : seen + length]
        return (mask == 1).flatten(2)

    def _begin(
        self,
        batch: int,
        length: int,
        drafts: int,
        pixels: Tensor | None,
        states: Tensor | None,
        attention_mask: Tensor | None,
    ) -> None:
        """Tell the manager that an image arrives, and what each text row may attend."""
        assert self._call is not None
        assert self._manager is not None
        source = pixels if pixels is not None else states
        assert source is not None
        tiles = self._inner.vision_model.max_num_tiles
        patches = self._call.patches
        if pixels is not None:
            new_units = pixels.shape[1] * pixels.shape[2]
        else:
            assert states is not None
            new_units = states[..., 0].numel() // (batch * patches)
        rows = self._call.rows
        if rows is None:
            rows = torch.ones(batch, 1, new_units, dtype=torch.bool, device=source.device)
        live = rows.any(-1).expand(-1, length).clone()
        if attention_mask is not None and attention_mask.ndim == 2:
            live &= attention_mask[:, -length:].to(live.device).bool()
        if drafts:
            rows = rows[:, : length - drafts] if rows.shape[1] > 1 else rows
            live = live[:, : length - drafts]
        units = torch.arange(rows.shape[-1], device=rows.device)
        visibility = Visibility(
            rows=rows,
            units=units.repeat_interleave(patches)[None],
            images=units // tiles,
            live=live,
        )
        per_sample = (
            source if source.shape[0] == batch else rearrange(source, "(b i) p c -> b i p c", b=batch)
        )
        self._manager.begin(visibility, new_units * patches, lambda: fingerprint(per_sample))
        self._hook_prefill(self._manager.policy.needs)

    def _after_inner(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        assert self._manager is not None
        self._call = None
        if self._manager.in_prefill:
            self._queries = self._raw_keys = None
            self.end_of_call()
            self._manager.end(completed=output is not None)

    def _before_layer(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call, manager = self._call, self._manager
        assert manager is not None
        if call is None:
            return None
        states = kwargs.get("cross_attention_states")
        heads = module.cross_attn.num_heads
        if states is None:
            layer = kwargs["past_key_values"].layers[module.layer_idx]
            if not isinstance(layer, CrossKVLayer):  # filled before the compression began
                layer = open_layer(require_cache(kwargs["past_key_values"]), module.layer_idx)
            if call.rows is not None and call.rows.shape[-1] * call.patches != layer.columns:
                raise UnsupportedCacheError(
                    f"cross_attention_mask covers {call.rows.shape[-1]} tiles of {call.patches} columns, but "
                    f"the cache has seen {layer.columns} columns; pass a mask over all images so far"
                )
            mask = call.attention_mask(layer.slots, layer.valid, layer.ragged, heads)
            masks = {"cross_attention_mask": mask, "full_text_row_masked_out_mask": call.row_mask}
            return args, {**kwargs, **masks}
        layer = open_layer(require_cache(kwargs["past_key_values"]), module.layer_idx)
        received = manager.before_layer(self._layer_indices.index(module.layer_idx), layer)
        # Images and tiles become columns: [B * images, tiles * patches, C] to [B, S, C].
        states = states.reshape(args[0].shape[0], -1, states.shape[-1])
        new_columns = states.shape[1]
        if received is not None:
            states = gather_features(states, received.indices[:, 0])
        expected = layer.expected(new_columns)
        slots, valid = expected if expected is not None else (None, None)
        ragged = layer.ragged or (received is not None and received.is_ragged)
        mask = call.attention_mask(slots, valid, ragged, heads)
        masks = {"cross_attention_mask": mask, "full_text_row_masked_out_mask": call.row_mask}
        return args, {**kwargs, "cross_attention_states": states, **masks}

    def _after_layer(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        manager = self._manager
        assert manager is not None
        manager.after_layer(
            self._layer_indices.index(module.layer_idx),
            kwargs["past_key_values"].layers[module.layer_idx],
            scaling=module.cross_attn.scaling,
            queries=self._queries,
            raw_keys=self._raw_keys,
        )
        self._queries = self._raw_keys = None

    def _after_q_norm(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        self._queries = output

    def _before_k_norm(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        self._raw_keys = args[0]

    @classmethod
    def probe(cls) -> list[Probe]:
        """Check the names and signatures that the hooks rely on."""
        signatures = probe_signatures(
            "transformers.models.mllama.modeling_mllama",
            {
                "MllamaForConditionalGeneration": ("logits_to_keep", "cross_attention_mask", "pixel_values"),
                "MllamaModel": ("cross_attention_mask", "cross_attention_states", "past_key_values"),
                "MllamaTextModel": ("full_text_row_masked_out_mask", "cross_attention_states"),
                "MllamaCrossAttentionDecoderLayer": (
                    "cross_attention_states",
                    "cross_attention_mask",
                    "past_key_values",
                ),
                "MllamaTextCrossAttention": ("cross_attention_states", "attention_mask", "past_key_values"),
            },
        )
        return [probe_cache(), *signatures]
