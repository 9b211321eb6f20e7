"""Captures the text's self-attention in one prefill, for policies that need "text" or prune the text cache.

Self-attention modules of transformers project with three linear layers, apply rotary embeddings (or not),
update the cache and attend. Hooks capture the projected queries, and rotate them with the model's own
function. Keys and values are read from the cache, which also has those of earlier turns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache, StaticLayer

from kvprune.adapters.arguments import cache_of, named_arguments
from kvprune.adapters.attachment import Attachment
from kvprune.cache.text_layer import TextKVLayer
from kvprune.errors import UnsupportedCacheError
from kvprune.policy.text_view import TextView

__all__ = ["Rotate", "TextCapture"]

Rotate = Callable[[Tensor, Tensor, Mapping[str, Any]], tuple[Tensor, Tensor]]
"""Rotates queries and keys, ``[B, H, T, D]`` each, with the arguments of the module's forward call."""


@dataclass
class TextCapture:
    """Captures self-attention modules in one forward call.

    Args:
        policy_name: For messages.
        done: Called after each captured self-attention, with its view and the cache that it updated.
        modules: All self-attention modules of the decoder by layer index, in order.
        mask: int or bool ``[B, tokens so far]``, zero at padding; or ``[B, 1, T, tokens]``
            as it enters attention, boolean or additive; None where there is none.
        copies: Consecutive rows of the batch that are equal.
        rotate: Rotates queries and keys; None in models without rotary embeddings.
        projections: Attributes of a module that project queries, keys and values.
    """

    policy_name: str
    done: Callable[[TextView, Cache | None], None]
    modules: Mapping[int, Any]
    mask: Tensor | None
    copies: int = 1
    rotate: Rotate | None = None
    projections: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")
    _projected: dict[str, Tensor] = field(default_factory=dict, init=False)

    _names: ClassVar[tuple[str, str, str]] = ("queries", "keys", "values")

    def hook(self, attachment: Attachment, layers: set[int], *, cached: bool) -> None:
        """Hook some layers for one forward call.

        Args:
            attachment: Removes the hooks when the call ends.
            layers: Indices of the layers to capture.
            cached: Whether keys and values can be read from a cache.
        """
        for layer_idx in sorted(layers):
            module = self.modules[layer_idx]
            for name, projection in zip(self._names, self.projections, strict=True):
                if name == "queries" or not cached:
                    attachment.after(
                        getattr(module, projection), self._catch(module, name), for_one_call=True
                    )
            attachment.after(module, self._look(layer_idx), for_one_call=True)

    def _catch(self, module: Any, name: str) -> Callable[..., None]:
        """Return a hook that captures the output of a projection."""
        heads = module.num_heads
        if name != "queries":
            heads = getattr(module, "num_key_value_heads", heads)

        def catch(projection: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            self._projected[name] = rearrange(output, "b t (h d) -> b h t d", h=heads)

        return catch

    def _look(self, layer_idx: int) -> Callable[..., None]:
        """Return a hook that builds the view of a module that has attended."""

        def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            named = named_arguments(module, args, kwargs)
            self.done(self._view(layer_idx, module, named), cache_of(named))

        return look

    def _view(self, layer_idx: int, module: Any, named: Mapping[str, Any]) -> TextView:
        queries = self._projected.pop("queries")  # [B, Hq, T, D]
        fresh = self._projected.pop("keys", None)  # [B, Hkv, T, D]; None if the cache has them
        if self.rotate is not None:
            queries, rotated = self.rotate(queries, queries[:, :0] if fresh is None else fresh, named)
            fresh = None if fresh is None else rotated
        if fresh is None:
            keys, values = self._cached(cache_of(named), layer_idx)
        else:
            keys, values = fresh, self._projected.pop("values")
        entries, one = keys.shape[2], slice(None, None, self.copies)  # one of each copies rows
        real = self._real(entries, keys)
        return TextView(
            queries=queries[one],
            keys=keys[one],
            values=values[one],
            real=real[one],
            scaling=module.scaling,
            layer_idx=layer_idx,
            rank=list(self.modules).index(layer_idx),
            num_layers=len(self.modules),
            policy_name=self.policy_name,
        )

    def _cached(self, cache: Cache, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values that a layer has attended to, ``[B, Hkv, entries, D]``."""
        flat = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        layer: Any = flat.layers[layer_idx]
        if type(layer) is StaticLayer:  # preallocated to its maximum length
            seen = int(layer.get_seq_length())
            static: Any = layer
            return static.keys[:, :, :seen], static.values[:, :, :seen]
        if type(layer) not in (DynamicLayer, TextKVLayer):
            raise UnsupportedCacheError(
                f"policy {self.policy_name!r} needs text, but {type(flat).__name__} holds it in a "
                f"{type(layer).__name__}, whose keys cannot be read; generate with the default cache"
            )
        return layer.keys, layer.values

    def _real(self, entries: int, keys: Tensor) -> Tensor:
        """Return which entries are not padding, bool ``[B, entries]``."""
        mask = self.mask
        if mask is None:
            return torch.ones(keys.shape[0], entries, dtype=torch.bool, device=keys.device)
        if mask.ndim == 4:
            return self._from_rows(mask, entries).to(keys.device)
        if mask.ndim != 2 or mask.shape[1] < entries:
            raise UnsupportedCacheError(
                f"policy {self.policy_name!r} needs text, so attention_mask must be [B, tokens] over "
                f"the whole conversation of {entries} tokens, with zeros at padding, got {list(mask.shape)}"
            )
        return mask[:, -entries:].to(keys.device).bool()

    def _from_rows(self, mask: Tensor, entries: int) -> Tensor:
        """Return the same from a mask ``[B, 1, T, width]``, width >= entries, as static caches get it."""
        allowed = mask if mask.dtype == torch.bool else mask >= 0
        allowed = allowed[:, :, :, :entries]
        real = allowed.any(2)[:, 0]  # [B, entries]
        causal = torch.ones(mask.shape[2], entries, dtype=torch.bool, device=mask.device)  # [T, entries]
        causal = causal.tril(entries - mask.shape[2])
        if not torch.equal(allowed, (causal & real[:, None])[:, None]):
            raise UnsupportedCacheError(
                f"policy {self.policy_name!r} needs text, so attention_mask must be causal and hide nothing "
                "else but padding, which this one is not; pass a mask [B, tokens] with zeros at padding"
            )
        return real
