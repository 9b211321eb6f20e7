"""One forward call of a model under compression: what lives no longer than the call.

An adapter makes a `Call` when its model is called and lets go of it when the call ends, also by exception.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from einops import rearrange
from torch import Tensor, nn
from transformers.cache_utils import Cache

from kvprune.adapters.attachment import Attachment
from kvprune.adapters.features import gather_features
from kvprune.cache.contents import Arrival
from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.cache.placement import open_for_prefill
from kvprune.engine.manager import CrossKVManager
from kvprune.policy.captured import Captured

__all__ = ["Call"]

_CAPTURED = frozenset(field.name for field in fields(Captured))


class Call:
    """What the layers of one forward call share.

    Args:
        manager: Is told of each prefill.

    Attributes:
        needs: What the policy needs beyond keys, values and visibility.
        tensors: Captured in the layer that runs now, by name, for each row of the batch.
        transient: Holds the keys and values of the layer that runs now if there is no cache.
    """

    keys_are_raw = False
    """Whether keys are cached as they were projected: the family has no key norm."""

    def __init__(self, manager: CrossKVManager) -> None:
        self.manager = manager
        self.needs = manager.policy.needs
        self.tensors: dict[str, Tensor] = {}
        self.transient: CrossKVLayer | None = None

    def layer_for(self, cache: Cache | None, layer_idx: int) -> CrossKVLayer:
        """Return what holds a layer's keys and values: in the cache, or for this call only."""
        if cache is None:
            self.transient = CrossKVLayer()
            return self.transient
        return open_for_prefill(cache, layer_idx, self.manager.report.warn)

    def arrive(self, rank: int, layer: CrossKVLayer, features: Tensor) -> tuple[Arrival, Tensor]:
        """Tell the manager that features reach a layer; return what arrives, and its features.

        Args:
            rank: Of the layer among the cross-attention layers.
            layer: Its cache layer.
            features: ``[B, S, C]``, all new columns.
        """
        arrival = self.manager.before_layer(rank, layer, features)
        if arrival.received is not None:
            features = gather_features(features, arrival.received.repeat(layer.copies))  # [B, K, C]
        if "features" in self.needs:
            self.tensors["features"] = features
        return arrival, features

    def leave(
        self, rank: int, layer_idx: int, cache: Cache | None, *, scaling: float, follows_text: bool = True
    ) -> None:
        """Tell the manager that a layer has attended.

        Args:
            rank: Of the layer among the cross-attention layers.
            layer_idx: Of the layer in the decoder.
            cache: Holds its keys and values, if there is a cache.
            scaling: Factor on attention logits.
            follows_text: Whether a self-attention of the text comes before the layer.
        """
        layer = self.transient
        if layer is not None:
            layer.update(self.tensors.pop("keys"), self.tensors.pop("values"))
        else:
            assert cache is not None
            found = cache.layers[layer_idx]
            assert isinstance(found, CrossKVLayer)
            layer = found
        if self.keys_are_raw and "raw_keys" in self.needs:
            self.tensors["raw_keys"] = layer.spread()[0]
        taken: dict[str, Any] = {name: self.tensors.pop(name) for name in _CAPTURED & self.tensors.keys()}
        self.manager.after_layer(
            rank, layer, scaling=scaling, captured=Captured(**taken), follows_text=follows_text
        )
        self.transient = None

    def keep_output(self, attachment: Attachment, module: Any, name: str, heads: int | None = None) -> None:
        """Keep what a module returns until its layer has attended.

        Args:
            attachment: Removes the hook when the call ends.
            module: Its output is ``[B, H, N, D]``, or ``[B, N, H * D]``.
            name: Under which it is kept.
            heads: Number of heads H, if the output has to be split into heads.
        """

        def keep(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            split = output if heads is None else rearrange(output, "b n (h d) -> b h n d", h=heads)
            self.tensors[name] = split

        attachment.after(module, keep, for_one_call=True)

    def keep_input(self, attachment: Attachment, module: Any, name: str) -> None:
        """Keep what a module is called with until its layer has attended; see `keep_output`."""

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
            self.tensors[name] = args[0]

        attachment.before(module, keep, for_one_call=True)
