"""State and steps that all families share in one forward call of a model under compression.

An adapter makes a `Call` when its model is called and discards it when the call ends, also by an exception.
In prefill, each cross-attention layer uses it twice: `Call.before_layer` runs before the layer, and gets
the columns that arrive from the manager. `Call.after_layer` runs after it, and hands the manager the tensors
that hooks have captured in between (`Call.capture`).
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers.cache_utils import Cache

from kvprune.adapters.attachment import Attachment
from kvprune.adapters.features import gather_features, to_all_columns
from kvprune.adapters.rereading import Rereading
from kvprune.adapters.sites import Projection, Site
from kvprune.cache.contents import Arrival, Contents
from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.cache.placement import open_for_prefill
from kvprune.cache.reader import Reader
from kvprune.engine.manager import CrossKVManager
from kvprune.engine.step_counts import Readable
from kvprune.errors import UnsupportedModelError
from kvprune.policy.captured import Captured

__all__ = ["Call"]

_CAPTURED = frozenset(field.name for field in fields(Captured))


class Call:
    """One forward call, shared by its layers.

    Args:
        manager: The cache manager.
        reader: Cuts masks to what cache layers hold; they refuse to be read once it is released.

    Attributes:
        needs: What the policy needs in addition to keys, values and visibility.
        attended: What the current layer attends to, and how many columns there are; None before the first.
        tensors: Captured in the current layer, by name, for each row of the batch.
        transient: Holds the keys and values of the current layer if there is no cache.
        returns_weights: Whether modules may return attention weights, which belong back to their columns.
        readable: What text rows may attend to in a decode step in which a policy decides, by the mask.
        again: The call that reads the last token again when this prefill has completed; None if none will.
    """

    def __init__(self, manager: CrossKVManager, reader: Reader | None = None) -> None:
        self.manager = manager
        self.reader = reader
        self.attended: tuple[Contents, int] | None = None
        self.needs = manager.policy.needs
        self.tensors: dict[str, Tensor] = {}
        self.transient: CrossKVLayer | None = None
        self.returns_weights = True
        self.again: Rereading | None = None
        self.readable: list[tuple[Tensor | None, Readable]] = []
        self._encoded: Tensor | None = None

    def layer_for(self, cache: Cache | None, layer_idx: int) -> CrossKVLayer:
        """Return the `CrossKVLayer` of a layer: in the cache, or a transient one if there is no cache."""
        if cache is None:
            self.transient = CrossKVLayer()
            return self.transient
        return open_for_prefill(cache, layer_idx, self.manager.report.warn, self.reader)

    def before_layer(
        self, rank: int, layer: CrossKVLayer, features: Tensor, text: Tensor | None = None
    ) -> tuple[Arrival, Tensor]:
        """Tell the manager that a layer is about to run; return the columns that arrive, and their features.

        Args:
            rank: Index among the cross-attention layers.
            layer: Its cache layer.
            features: ``[B, S, C]``, all new columns.
            text: ``[B, T, C]``, the hidden states that attend; None if unknown.

        Returns:
            What arrives, for R rows, and its features, ``[B, K, C]``.

        Raises:
            UnsupportedModelError: If rows that are held once differ by now, or if new tokens stand in the
                place of features that are not the same in each layer.
        """
        self._encoded = features if self._encoded is None else self._encoded
        arrival = self.manager.before_layer(rank, layer, features)
        if text is not None and layer.copies > 1:
            _require_alike(text, layer.copies, self.manager.layer_indices[rank])
        self.attended = arrival.contents, layer.columns + arrival.columns
        if arrival.received is not None:
            replaced = arrival.replaced and arrival.replaced.repeat(layer.copies)
            if replaced is not None:
                self._require_replaceable(features, self.manager.layer_indices[rank])
            features = gather_features(features, arrival.received.repeat(layer.copies), replaced)  # [B, K, C]
        if "features" in self.needs:
            self.tensors["features"] = features
        return arrival, features

    def _require_replaceable(self, features: Tensor, layer_idx: int) -> None:
        """Raise unless a layer gets the features that the first one got, of which new tokens were made."""
        first = self._encoded
        if first is None or features is first:
            return
        if features.shape == first.shape and features.dtype == first.dtype:
            if features.device == first.device and features.data_ptr() == first.data_ptr():
                return
            if torch.equal(features, first.to(features.device)):
                return
        raise UnsupportedModelError(
            "the policy puts new tokens, made of the first layer's features, in the place of columns, but "
            f"layer {layer_idx} of this model gets other features than the first one "
            f"({features.dtype} {list(features.shape)}, the first one {first.dtype} {list(first.shape)}); "
            "policies that make new tokens need a model whose layers all get the same"
        )

    def after_layer(self, rank: int, site: Site, cache: Cache | None, *, follows_text: bool = True) -> None:
        """Tell the manager that a layer has attended, and hand over what was captured in it.

        Args:
            rank: Index among the cross-attention layers.
            site: The cross-attention of the layer.
            cache: The cache that holds its keys and values; None if there is none.
            follows_text: Whether a self-attention layer comes before this layer.
        """
        layer = self.transient
        if layer is not None:  # no cache: hooks kept what the layer projected
            layer.update(self.tensors.pop("keys"), self.tensors.pop("values"))
        else:
            assert cache is not None
            found = cache.layers[site.layer_idx]
            assert isinstance(found, CrossKVLayer)
            layer = found
        if site.key_norm is None and "raw_keys" in self.needs:
            self.tensors["raw_keys"] = layer.spread()[0]
        taken: dict[str, Any] = {name: self.tensors.pop(name) for name in _CAPTURED & self.tensors.keys()}
        self.manager.after_layer(
            rank, layer, scaling=site.scaling, captured=Captured(**taken), follows_text=follows_text
        )
        self.transient = None

    def all_columns(self, output: Any, site: Site) -> Any:
        """Put the attention weights that a module returns back to their columns; dropped ones have weight 0.

        Args:
            output: What the module returned: a tuple with weights ``[B, Hq, T, K]`` or None at
                `Site.weights_at`.
            site: The module.

        Returns:
            The output with weights ``[B, Hq, T, S]``; None if there is nothing to change.
        """
        at = site.weights_at
        if self.attended is None or not isinstance(output, tuple) or len(output) <= at or output[at] is None:
            return None
        contents, columns = self.attended
        if contents.slots is None:
            return None
        return *output[:at], to_all_columns(output[at], contents, columns), *output[at + 1 :]

    def capture(self, attachment: Attachment, site: Site, *, cached: bool) -> None:
        """Capture what the policy needs of a layer until it has attended.

        Args:
            attachment: Removes the hooks when the call ends.
            site: The cross-attention of the layer.
            cached: Whether a cache layer has its keys and values.
        """
        if "queries" in self.needs:
            self._keep_output(attachment, site.query, site.query_norm, "queries", site.heads)
        if "raw_keys" in self.needs and site.key_norm is not None:  # else they are the cached ones
            self._keep_input(attachment, site.key_norm, "raw_keys")
        if not cached:
            self._keep_output(attachment, site.key, site.key_norm, "keys", site.kv_heads)
            self._keep_output(attachment, site.value, None, "values", site.kv_heads)

    def _keep_output(
        self, attachment: Attachment, projection: Projection, norm: Any, name: str, heads: int
    ) -> None:
        """Capture what a projection returns, or the norm after it, as ``[B, H, N, D]``."""

        def keep(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            if output.ndim == 3:  # [B, N, H * D]
                output = rearrange(projection.of(output), "b n (h d) -> b h n d", h=heads)
            self.tensors[name] = output

        attachment.after(norm or projection.module, keep, for_one_call=True)

    def _keep_input(self, attachment: Attachment, module: Any, name: str) -> None:
        """Capture the first argument of a module."""

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
            self.tensors[name] = args[0]

        attachment.before(module, keep, for_one_call=True)


_ROUNDING = 64
"""Rows of one batch may go through different kernels; their difference in multiples of the dtype's "
"precision."""


def _require_alike(text: Tensor, copies: int, layer_idx: int) -> None:
    """Raise if rows that the cache holds once have become different; one device transfer.

    Args:
        text: ``[B, T, C]``, the hidden states that attend.
        copies: Consecutive rows that are held once.
        layer_idx: Index of the decoder layer.
    """
    rows = text.unflatten(0, (-1, copies))  # [R, copies, T, C]
    apart = (rows[:, 1:] - rows[:, :1]).abs().amax()
    if bool(apart > _ROUNDING * torch.finfo(text.dtype).eps * text.abs().amax()):
        raise UnsupportedModelError(
            "beams or return sequences of one sample share their image in the cache, but at layer "
            f"{layer_idx} their hidden states differ by {float(apart):.3g}: something treats rows of the "
            "batch differently, such as a hook or an adapter for each row; repeat the samples in the batch "
            "instead"
        )
