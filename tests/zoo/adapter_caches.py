"""Broken adapters whose cache layers hold other rows, entries or columns than they should.

``ADAPTERS_WITH_CACHES`` lists them. Each has one defect, and derives from an adapter without defects.
"""

from __future__ import annotations

import dataclasses
import inspect

from kvprune.adapters.arguments import cache_of
from kvprune.adapters.families.texts import BartAdapter
from kvprune.adapters.mllama import MllamaAdapter
from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.cache.shared_rows import SharedRows
from kvprune.tokens.selection import Selection


class SharesRowsThatDiffer(MllamaAdapter):
    """Treats all rows of a batch as copies of one sample."""

    caught_by = ("KV11", "KV13")

    def _begin(self, call, named, batch, length):
        begin = self._manager.begin

        def share(visibility, *args, **kwargs):
            first = dataclasses.replace(visibility, rows=visibility.rows[:1], live=visibility.live[:1])
            begin(first, *args, **{**kwargs, "shared_rows": SharedRows(batch)})

        self._manager.begin = share
        try:
            super()._begin(call, named, batch, length)
        finally:
            del self._manager.begin


class LeavesSlotsBehind(BartAdapter):
    """Its cache layers reorder keys and values, but not the columns that they belong to."""

    caught_by = ("KV11",)

    class Layer(CrossKVLayer):
        def batch_select_indices(self, indices):
            slots, valid = self.slots, self.valid
            super().batch_select_indices(indices)
            rows = len(self.spread()[0])
            if slots is not None and rows <= len(slots):
                self.slots, self.valid = slots[:rows], valid[:rows]

    def _after_attention(self, module, args, kwargs, output):
        super()._after_attention(module, args, kwargs, output)
        cache_of(kwargs).cross_attention_cache.layers[module.layer_idx].__class__ = self.Layer


class RollsKeptValues(BartAdapter):
    """Stores each kept value at the place of another."""

    caught_by = ("KV11",)

    def _after_attention(self, module, args, kwargs, output):
        super()._after_attention(module, args, kwargs, output)
        layer = cache_of(kwargs).cross_attention_cache.layers[module.layer_idx]
        layer.values = layer.values.roll(1, dims=2)


class ForgetsWhileDecoding(BartAdapter):
    """Drops an entry whenever decoding reads several tokens at once."""

    caught_by = ("KV11",)

    def _decode(self, call, module, cache, named):
        layer = cache.cross_attention_cache.layers[module.layer_idx]
        if named["hidden_states"].shape[1] > 1 and layer.width > 1:
            layer.keys, layer.values = layer.keys[:, :, 1:], layer.values[:, :, 1:]
            layer.slots, layer.valid = (tensor[..., 1:] for tensor in layer.entries())
        return super()._decode(call, module, cache, named)


class UnsortedSlots(BartAdapter):
    """Its cache layers report what they keep in reverse order."""

    caught_by = ("KV01",)

    class Layer(CrossKVLayer):
        def selection(self, *args, **kwargs):
            said = super().selection(*args, **kwargs)
            return Selection.trusted(said.indices.flip(-1), said.valid.flip(-1), said.columns)

    def _receive(self, call, rank, site, cache, named):
        received = super()._receive(call, rank, site, cache, named)
        cache.cross_attention_cache.layers[site.layer_idx].__class__ = self.Layer
        return received


ADAPTERS_WITH_CACHES = [
    cls for cls in list(globals().values()) if inspect.isclass(cls) and hasattr(cls, "caught_by")
]
