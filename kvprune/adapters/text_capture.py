"""Captures the text's self-attention in one prefill, for policies that need "text" or prune the text cache.

Self-attention modules of transformers project queries, keys and values, apply rotary embeddings (or not),
update the cache and attend. Hooks capture the projected queries, and rotate them with the model's own
function. Keys and values are read from the cache, which also has those of earlier turns.
`kvprune.adapters.text_sites` finds the modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache, StaticLayer

from kvprune.adapters.arguments import cache_of, named_arguments
from kvprune.adapters.attachment import Attachment
from kvprune.adapters.sites import Projection
from kvprune.adapters.text_sites import TextSite
from kvprune.cache.text_layer import TextKVLayer
from kvprune.errors import UnsupportedCacheError, UnsupportedModelError
from kvprune.policy.text_view import TextView

__all__ = ["TextCapture"]

_STATES = "encoder_hidden_states", "key_value_states"


@dataclass
class TextCapture:
    """Captures self-attention modules in one forward call.

    Args:
        policy_name: For messages.
        done: Called after each captured self-attention, with its view and the cache that it updated.
        sites: All self-attention modules of the decoder by layer index, in order.
        mask: int or bool ``[B, tokens so far]``, zero at padding; or ``[B, 1, T, tokens]``
            as it enters attention, boolean or additive; None where there is none.
        copies: Consecutive rows of the batch that are equal.
    """

    policy_name: str
    done: Callable[[TextView, Cache | None], None]
    sites: Mapping[int, TextSite]
    mask: Tensor | None
    copies: int = 1
    _projected: dict[str, Tensor] = field(default_factory=dict, init=False)

    def hook(self, attachment: Attachment, layers: set[int], *, cached: bool) -> None:
        """Hook some layers for one forward call.

        Args:
            attachment: Removes the hooks when the call ends.
            layers: Indices of the layers to capture.
            cached: Whether keys and values can be read from a cache.
        """
        for layer_idx in sorted(layers):
            site = self.sites[layer_idx]
            self._catch(attachment, site.query, "queries", site.heads)
            if not cached:
                self._catch(attachment, site.key, "keys", site.kv_heads)
                self._catch(attachment, site.value, "values", site.kv_heads)
            attachment.after(site.module, self._look(site), for_one_call=True)

    def _catch(self, attachment: Attachment, projection: Projection, name: str, heads: int) -> None:
        """Capture the output of a projection."""

        def catch(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            self._projected[name] = rearrange(projection.of(output), "b t (h d) -> b h t d", h=heads)

        attachment.after(projection.module, catch, for_one_call=True)

    def _look(self, site: TextSite) -> Callable[..., None]:
        """Return a hook that builds the view of a module that has attended."""

        def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            named = named_arguments(module, args, kwargs)
            if any(named.get(name) is not None for name in _STATES):  # BigBird does
                raise UnsupportedModelError(
                    f"policy {self.policy_name!r} needs text, but {type(module).__name__} of layer "
                    f"{site.layer_idx}, which should attend to the text, is given encoder states"
                )
            self.done(self._view(site, named), cache_of(named))

        return look

    def _view(self, site: TextSite, named: Mapping[str, Any]) -> TextView:
        queries = self._projected.pop("queries")  # [B, Hq, T, D]
        fresh = self._projected.pop("keys", None)  # [B, Hkv, T, D]; None if the cache has them
        if site.rotate is not None:
            queries, rotated = site.rotate(queries, queries[:, :0] if fresh is None else fresh, named)
            fresh = None if fresh is None else rotated
        if fresh is None:
            keys, values = self._cached(cache_of(named), site.layer_idx)
        else:
            keys, values = fresh, self._projected.pop("values")
        entries, one = keys.shape[2], slice(None, None, self.copies)  # one of each copies rows
        real = self._real(entries, keys)
        return TextView(
            queries=queries[one],
            keys=keys[one],
            values=values[one],
            real=real[one],
            scaling=site.scaling,
            layer_idx=site.layer_idx,
            rank=list(self.sites).index(site.layer_idx),
            num_layers=len(self.sites),
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
