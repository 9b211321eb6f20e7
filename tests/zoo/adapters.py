"""Broken adapters. `check_adapter` must catch each by the ids in its ``caught_by``.

``ADAPTERS`` lists them. Each has one defect, and derives from an adapter without defects.
"""

from __future__ import annotations

import dataclasses
import inspect

import torch

from kvprune.adapters.arguments import cache_of
from kvprune.adapters.column_mask import ColumnMask
from kvprune.adapters.families.texts import BartAdapter
from kvprune.adapters.mllama import MllamaAdapter
from kvprune.adapters.mllama.tile_mask import TileMask
from kvprune.adapters.probes import probe_signatures


class StockDecodeMask(BartAdapter):
    """Gives decoding the stock mask, as wide as all columns."""

    caught_by = ("KV06", "KV13")

    def _decode(self, call, site, cache, named):
        decoded = super()._decode(call, site, cache, named)
        return {**decoded, site.mask: named.get(site.mask)}


class OneTooWide(BartAdapter):
    """Cuts the mask of decoding one column too wide."""

    caught_by = ("KV06",)

    def _decode(self, call, site, cache, named):
        decoded = super()._decode(call, site, cache, named)
        mask = decoded[site.mask]
        if mask is not None:
            mask = torch.cat([mask, mask[..., -1:]], dim=-1)
        return {**decoded, site.mask: mask}


class MasksByPosition(MllamaAdapter):
    """Looks up the tile of an entry by its place in the cache instead of its column."""

    caught_by = ("KV13",)

    class Mask(TileMask):
        def _cut(self, slots, valid, contents):
            places = torch.arange(slots.shape[-1]).expand_as(slots)
            return super()._cut(places, valid, contents)

    def _before_inner(self, module, args, kwargs):
        changed = super()._before_inner(module, args, kwargs)
        if self._call is not None:
            self._call.mask.__class__ = self.Mask
        return changed


class RemembersTheMask(BartAdapter):
    """Makes one mask for each width, so that a reordered cache gets the mask of the old order."""

    caught_by = ("KV09",)

    class Mask(ColumnMask):
        def __init__(self, made):
            super().__init__()
            self._by_width = made

        def over(self, mask, contents, *layer):
            if contents.slots is None:
                return super().over(mask, contents, *layer)
            if contents.slots.shape not in self._by_width:
                self._by_width[contents.slots.shape] = super().over(mask, contents, *layer)
            return self._by_width[contents.slots.shape]

    def _before_decoder(self, module, args, kwargs):
        super()._before_decoder(module, args, kwargs)
        if self._manager.in_prefill:
            self._made = {}
        else:
            self._call.mask = self.Mask(self._made)


class LeavesAHook(BartAdapter):
    caught_by = ("KV12",)

    def attach(self, manager):
        super().attach(manager)
        self._decoder.layers[-1].register_forward_hook(lambda module, args, output: None)


class LeavesIsCausal(MllamaAdapter):
    caught_by = ("KV12",)

    def attach(self, manager):
        super().attach(manager)
        for site in self.sites:
            site.module.is_causal = False


class StaysAfterAnException(MllamaAdapter):
    """Treats a forward call that raised as one that still runs, and stays attached."""

    caught_by = ("KV12",)
    _broken = False

    def _after_inner(self, module, args, kwargs, output):
        super()._after_inner(module, args, kwargs, output)
        self._broken = output is None

    def detach(self):
        if not self._broken:
            super().detach()


class ForgetsHooksWhenAttachFails(BartAdapter):
    """Records its hooks only after all of them are registered."""

    caught_by = ("KV12",)

    def attach(self, manager):
        self._manager = manager
        handles = [
            self._decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            self._decoder.register_forward_hook(self._after_decoder, with_kwargs=True, always_call=True),
        ]
        for site in self.sites:
            handles.append(site.module.register_forward_pre_hook(self._before_attention, with_kwargs=True))
        self._handles += handles


class SkipsTheLastLayer(MllamaAdapter):
    """Omits the last cross-attention layer, which then gets stock masks and is never pruned."""

    caught_by = ("class",)

    def __init__(self, model):
        super().__init__(model)
        self._sites = self._sites[:-1]


class DecidesOnlyOnce(BartAdapter):
    """Asks the policy about the first layer only."""

    caught_by = ("class",)

    def _after_attention(self, module, args, kwargs, output):
        if module.layer_idx == 0:
            super()._after_attention(module, args, kwargs, output)


class UnsortedLayers(MllamaAdapter):
    caught_by = ("class",)

    def __init__(self, model):
        super().__init__(model)
        self._sites = self._sites[::-1]


class OffByOneOnward(BartAdapter):
    """Passes the neighbours of the chosen features to later layers."""

    caught_by = ("KV11", "KV13")

    def _receive(self, call, rank, site, cache, named):
        if self._manager._prefill.onward is not None:
            named = {**named, site.states: named[site.states].roll(-1, dims=1)}
        return super()._receive(call, rank, site, cache, named)


class SeesPadding(BartAdapter):
    """Reports the encoder's padding as visible."""

    caught_by = ("view", "KV02", "KV04", "KV10")

    def _visibility(self, tokens, states, encoder_mask, decoder_mask, copies):
        see = super()._visibility(tokens, states, encoder_mask, decoder_mask, copies)
        return dataclasses.replace(see, units=torch.zeros_like(see.units))


class CountsEveryRow(MllamaAdapter):
    """Reports padding rows, and text before the image, as live."""

    caught_by = ("view",)

    def _begin(self, call, named, batch, length):
        begin = self._manager.begin

        def with_all_rows(visibility, *args, **kwargs):
            live = torch.ones_like(visibility.live)
            begin(dataclasses.replace(visibility, live=live), *args, **kwargs)

        self._manager.begin = with_all_rows
        try:
            super()._begin(call, named, batch, length)
        finally:
            del self._manager.begin


class SwapsQueries(MllamaAdapter):
    """Shows each sample the queries of another."""

    caught_by = ("view", "KV10")

    def _after_layer(self, module, args, kwargs, output):
        if "queries" in self._call.tensors:
            self._call.tensors["queries"] = self._call.tensors["queries"].roll(1, dims=0)
        super()._after_layer(module, args, kwargs, output)


class NoScaling(BartAdapter):
    """Reports a scaling of 1 to policies."""

    caught_by = ("view",)

    def attach(self, manager):
        super().attach(_Unscaled(manager))


class _Unscaled:
    def __init__(self, manager):
        self._real = manager

    def __getattr__(self, name):
        return getattr(self._real, name)

    def after_layer(self, rank, layer, *, scaling, **known):
        self._real.after_layer(rank, layer, scaling=1.0, **known)


class NormedRawKeys(MllamaAdapter):
    """Captures keys after their norm as raw keys."""

    caught_by = ("view",)

    def _hook_layers(self, call, *, cached):
        needs, call.needs = call.needs, call.needs - {"raw_keys"}
        super()._hook_layers(call, cached=cached)
        call.needs = needs
        if "raw_keys" in needs:
            for site in self._sites:
                call._keep_output(self, site.key, site.key_norm, "raw_keys", site.kv_heads)


class RandomEachTime(BartAdapter):
    """Seeds random policies with another number in each call."""

    caught_by = ("KV10",)
    _calls = 0

    def _begin(self, call, named, states):
        super()._begin(call, named, states)
        type(self)._calls += 1
        drawn = torch.full((call.manager._prefill.visibility.batch,), self._calls)
        call.manager._prefill.fingerprints = lambda: drawn


class RoundsTheCache(MllamaAdapter):
    """Rounds the keys that it keeps, so that a full cache differs from the stock cache."""

    caught_by = ("KV07",)

    def _after_layer(self, module, args, kwargs, output):
        super()._after_layer(module, args, kwargs, output)
        layer = cache_of(kwargs).layers[module.layer_idx]
        layer.keys = layer.keys.bfloat16().to(layer.keys.dtype)


class HidesTheFirstTile(MllamaAdapter):
    """Hides the first tile of each image from policies, which then drop it."""

    caught_by = ("KV03", "KV08")

    def _begin(self, call, named, batch, length):
        rows = call.mask.rows
        if rows is not None:
            call.mask.rows = rows & (torch.arange(rows.shape[-1]) % 4 > 0)
        try:
            super()._begin(call, named, batch, length)
        finally:
            call.mask.rows = rows


class StarvesARow(MllamaAdapter):
    """Reports only the last text row as live, so that earlier ones may see nothing."""

    caught_by = ("KV05",)

    def _begin(self, call, named, batch, length):
        begin = self._manager.begin

        def with_the_last_row(visibility, *args, **kwargs):
            live = visibility.live.clone()
            live[:, :-1] = False
            begin(dataclasses.replace(visibility, live=live), *args, **kwargs)

        self._manager.begin = with_the_last_row
        try:
            super()._begin(call, named, batch, length)
        finally:
            del self._manager.begin


class ClaimsEverything(BartAdapter):
    """Matches any model."""

    caught_by = ("class",)

    @classmethod
    def matches(cls, model):
        return True


class RottenProbe(BartAdapter):
    """Relies on a class that transformers does not have."""

    caught_by = ("class",)

    @classmethod
    def probe(cls):
        wanted = {"BartCrossAttention": ("key_value_states",)}
        return [*super().probe(), *probe_signatures("transformers.models.bart.modeling_bart", wanted)]


ADAPTERS = [cls for cls in list(globals().values()) if inspect.isclass(cls) and hasattr(cls, "caught_by")]
