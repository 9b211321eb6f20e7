"""State and steps that all families share in one forward call of a model under compression.

An adapter makes a `Call` when its model is called and discards it when the call ends, also by an exception.
In prefill, each cross-attention layer uses it twice: `Call.before_layer` runs before the layer, and gets
the columns that arrive from the manager. `Call.after_layer` runs after it, and hands the manager the tensors
that hooks have captured in between (`Call.keep_output`, `Call.keep_input`).
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
    """One forward call, shared by its layers.

    Args:
        manager: The cache manager.

    Attributes:
        needs: What the policy needs in addition to keys, values and visibility.
        tensors: Captured in the current layer, by name, for each row of the batch.
        transient: Holds the keys and values of the current layer if there is no cache.
    """

    keys_are_raw = False
    """Whether keys are cached as projected, because the family has no key norm."""

    def __init__(self, manager: CrossKVManager) -> None:
        self.manager = manager
        self.needs = manager.policy.needs
        self.tensors: dict[str, Tensor] = {}
        self.transient: CrossKVLayer | None = None

    def layer_for(self, cache: Cache | None, layer_idx: int) -> CrossKVLayer:
        """Return the `CrossKVLayer` of a layer: in the cache, or a transient one if there is no cache."""
        if cache is None:
            self.transient = CrossKVLayer()
            return self.transient
        return open_for_prefill(cache, layer_idx, self.manager.report.warn)

    def before_layer(self, rank: int, layer: CrossKVLayer, features: Tensor) -> tuple[Arrival, Tensor]:
        """Tell the manager that a layer is about to run; return the columns that arrive, and their features.

        Args:
            rank: Index among the cross-attention layers.
            layer: Its cache layer.
            features: ``[B, S, C]``, all new columns.

        Returns:
            What arrives, for R rows, and its features, ``[B, K, C]``.
        """
        arrival = self.manager.before_layer(rank, layer, features)
        if arrival.received is not None:
            features = gather_features(features, arrival.received.repeat(layer.copies))  # [B, K, C]
        if "features" in self.needs:
            self.tensors["features"] = features
        return arrival, features

    def after_layer(
        self, rank: int, layer_idx: int, cache: Cache | None, *, scaling: float, follows_text: bool = True
    ) -> None:
        """Tell the manager that a layer has attended, and hand over what was captured in it.

        Args:
            rank: Index among the cross-attention layers.
            layer_idx: Index of the decoder layer.
            cache: The cache that holds its keys and values; None if there is none.
            scaling: Factor on attention logits.
            follows_text: Whether a self-attention layer comes before this layer.
        """
        layer = self.transient
        if layer is not None:  # no cache: hooks kept what the layer projected
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
        """Capture the output of a module until its layer has attended.

        Args:
            attachment: Removes the hook when the call ends.
            module: Returns ``[B, H, N, D]``, or ``[B, N, H * D]`` if ``heads`` is given.
            name: Key in `tensors`.
            heads: Number of heads H into which the output is split.
        """

        def keep(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            split = output if heads is None else rearrange(output, "b n (h d) -> b h n d", h=heads)
            self.tensors[name] = split

        attachment.after(module, keep, for_one_call=True)

    def keep_input(self, attachment: Attachment, module: Any, name: str) -> None:
        """Capture the first argument of a module until its layer has attended; see `keep_output`."""

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
            self.tensors[name] = args[0]

        attachment.before(module, keep, for_one_call=True)
