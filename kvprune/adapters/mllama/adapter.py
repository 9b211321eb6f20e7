"""The adapter for Llama-3.2-Vision (class Mllama in transformers).

A few decoder layers attend to image features, and cache their keys and values in the ordinary flat cache.
Columns are ordered by image, tile and patch, so the unit of visibility is a tile of an image.

The hooks, in the order in which they run in a forward call (see the picture in `docs/hooks.md`):

1. before ``MllamaModel``: remove the raw mask, so that stock does not expand it to one column per patch;
   begin a prefill if an image arrives;
2. before each cross-attention layer: in prefill, put a `CrossKVLayer` into the cache and pass only the
   features that arrive; always, pass a mask of the width that the layer holds;
3. after each cross-attention: put attention weights, if the model returns them, back to their columns;
4. after each cross-attention layer in prefill: the manager asks the policy;
5. after ``MllamaModel``: read the last token again if asked, and end the prefill.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
import transformers
from torch import Tensor, nn

from kvprune.adapters.arguments import cache_of, has_cache, named_arguments, tokens_of, with_cache
from kvprune.adapters.base import Site
from kvprune.adapters.call import Call
from kvprune.adapters.generation import CANDIDATES, prompt_first
from kvprune.adapters.inspection import find_sites
from kvprune.adapters.mllama import guide
from kvprune.adapters.mllama.captures import capture_class_attention, capture_text, tile_layout
from kvprune.adapters.mllama.description import Describing
from kvprune.adapters.mllama.probes import mllama_probes
from kvprune.adapters.mllama.question import capture_question, read_question
from kvprune.adapters.mllama.tile_mask import TileMask
from kvprune.adapters.mllama.visibility import (
    arriving_tiles,
    last_text,
    repeated_rows,
    tiles_of_rows,
    visibility_of,
)
from kvprune.adapters.probes import Probe
from kvprune.adapters.rereading import last_row
from kvprune.adapters.stepping import stepped
from kvprune.adapters.text_mask import fit_text_mask
from kvprune.adapters.tiny.models import example_mllama
from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.cache.placement import OneLayer, open_layer, require_cache
from kvprune.cache.reader import Reader
from kvprune.cache.shared_rows import SharedRows, may_share
from kvprune.engine.guidance import Prompt
from kvprune.engine.manager import CrossKVManager
from kvprune.errors import UnsupportedCacheError, UnsupportedModelError
from kvprune.tokens.layout import IMAGE_TOKEN
from kvprune.tokens.randomness import fingerprint
from kvprune.tokens.visibility import Visibility

__all__ = ["MllamaAdapter"]


class _Call(Call):
    """One forward call of an Mllama.

    Args:
        manager: The cache manager.
        reader: Cuts the masks.
        mask: The masks of the call.
    """

    def __init__(self, manager: CrossKVManager, reader: Reader, mask: TileMask) -> None:
        super().__init__(manager, reader)
        self.mask = mask


class MllamaAdapter(Describing):
    """Adapter for ``MllamaForConditionalGeneration`` and ``MllamaModel``.

    Class attributes:
        class_attention_layer: Source of `View.class_attention`: an encoder of the vision tower ("transformer"
            or "global_transformer", which follows it) and the index of a layer in it. The default is the last
            layer, because the text model receives its output, as LLaVA receives that of CLIP's second last
            layer. The text model also receives five intermediate layers of the first encoder, but none of
            them is representative. Derive a class to use another layer.
    """

    family = "Llama-3.2-Vision (Mllama)"
    model_classes = ("MllamaForConditionalGeneration", "MllamaModel")
    provides = Describing.provides.union(
        ("text", "text_cache", "guidance", "reconstruction", "class_attention", "grid", "question")
    )
    rereads = True
    column_unit = IMAGE_TOKEN
    class_attention_layer: ClassVar[tuple[str, int]] = ("global_transformer", -1)

    _call: _Call | None  # the current call of the inner model

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        # The outer model holds the inner one as `.model`; the inner one holds vision and language models.
        self._inner = cast(Any, model if hasattr(model, "language_model") else model.get_submodule("model"))
        self._text = cast(Any, self._inner.language_model)
        self._sites = tuple(find_sites(self._text, self.family).values())
        # Of each cross-attention layer (3, 8, 13, ... in Llama-3.2-11B-Vision): its rank, and the module.
        self._by_layer = {site.layer_idx: (rank, site) for rank, site in enumerate(self._sites)}
        self._masks: TileMask | None = None  # of the latest decode step

    @property
    def sites(self) -> Sequence[Site]:
        """The cross-attention modules of the language model."""
        return self._sites

    @property
    def encoder(self) -> nn.Module:
        """The vision tower."""
        return cast(nn.Module, self._inner.vision_model)

    def attach(self, manager: CrossKVManager) -> None:
        """Add the hooks that the module docstring lists."""
        self._manager = manager
        self.hook_calls(self._inner, self._before_inner, self._after_inner)
        for site in self.sites:
            self.before(self._text.layers[site.layer_idx], self._before_layer)
            if manager.steps.is_active:
                self.before(site.module, self._before_step)
        self.around(self.model, CANDIDATES, prompt_first)

    def detach(self) -> None:
        """Undo `attach`, and forget the latest masks."""
        super().detach()
        self._masks = None

    def _before_inner(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.begin_call()
        self.spread_weights(self._text.config)
        named = named_arguments(module, args, kwargs)
        mask, cache, tokens = named.get("cross_attention_mask"), cache_of(named), tokens_of(named)
        if tokens is None:
            return args, kwargs  # the model itself raises an error
        batch, length = tokens.shape[:2]
        text_mask = fit_text_mask(cache, named.get("attention_mask"), batch, length, self.reader)
        named = {**named, "attention_mask": text_mask}
        rows = None if mask is None else tiles_of_rows(mask, length, cache)
        # The dtype of one weight: asking the model for its dtype walks over all of them.
        dtype, patches = self._text.embed_tokens.weight.dtype, self._inner.vision_model.num_patches
        masks = TileMask.after(self._masks, rows, patches, dtype, len(self._sites))
        self._masks = masks if length == 1 and not torch.compiler.is_compiling() else None
        self._call = _Call(self.manager, self.reader, masks)
        self._call.returns_weights = self.spreads_weights
        if named.get("pixel_values") is not None or named.get("cross_attention_states") is not None:
            if cache is not None:
                require_cache(cache)  # refuse before any layer has run
            self._begin(self._call, named, batch, length)
        # All arguments by name, because the mask may have been positional.
        return (), {**named, "cross_attention_mask": None}

    def _begin(self, call: _Call, named: dict[str, Any], batch: int, length: int) -> None:
        """Begin a prefill: tell the manager which columns arrive, and which text rows may attend them."""
        generation = self._generation_of(self.model, is_traced=torch.compiler.is_compiling())
        generation.require_whole_prompt(self.family)
        source, new_units = arriving_tiles(named, batch, call.mask.patches)
        rows = call.mask.rows
        if rows is None:
            rows = torch.ones(batch, 1, new_units, dtype=torch.bool, device=source.device)
        cached = self._is_cached(named)
        self.prepare_reread(call, named, cached=cached, cross_layers=self.layer_indices)
        # Rows are shared only for the first images in a cache.
        sharable = cached and rows.shape[-1] == new_units and may_share(self._text)
        shared_rows = repeated_rows(generation.repeats, named, source) if sharable else SharedRows()
        copies, policy, vision = shared_rows.copies, call.manager.policy, self._inner.vision_model
        capture = prompt = watch = None
        if "class_attention" in policy.needs:
            layer = self.class_attention_layer
            capture = capture_class_attention(self, policy.name, vision, layer, named, copies)
        if "question" in policy.needs:
            capture, watch = capture_question(self._text, named, copies, capture)
        if {"guidance", "reconstruction"} & policy.needs:
            prompt = guide.make_prompt(named, batch, length, copies)
        call.manager.begin(
            self._visibility(call, rows, named.get("attention_mask"), length, copies),
            new_units * call.mask.patches,
            lambda: fingerprint(source[::copies]),
            shared_rows=shared_rows,
            cached=cached,
            layout=tile_layout(vision, named, copies),
            prompt=prompt,
            capture=capture,
            before=watch,
        )
        self._hook_layers(call, cached=cached)
        if {"text", "text_cache"} & policy.needs:
            mask, layers = named.get("attention_mask"), self.layer_indices
            capture_text(self, call.manager, self._text, layers, mask, copies=copies, cached=cached)

    def _is_cached(self, named: dict[str, Any]) -> bool:
        """Whether the call has a cache that later calls read."""
        if self._text.training and any(layer.gradient_checkpointing for layer in self._text.layers):
            from transformers.modeling_layers import GradientCheckpointingLayer  # slow to import

            if "__call__" in GradientCheckpointingLayer.__dict__:
                raise UnsupportedModelError(
                    f"gradient checkpointing in transformers {transformers.__version__} runs the hooks of a "
                    "layer again in backward, after the selection was discarded; use 5.23.0 or newer, or "
                    "train without it (gradient_checkpointing_disable)"
                )
            return False  # transformers passes no cache to checkpointed layers
        return has_cache(named, self._text.config)

    def _visibility(
        self, call: _Call, rows: Tensor, attention_mask: Tensor | None, length: int, copies: int
    ) -> Visibility:
        """Return which columns the text rows may attend; see `visibility_of`."""
        return visibility_of(
            rows,
            attention_mask,
            length,
            copies=copies,
            patches=call.mask.patches,
            tiles=self._inner.vision_model.max_num_tiles,
        )

    def _hook_layers(self, call: _Call, *, cached: bool) -> None:
        """Add the hooks that only prefill needs; decoding, which runs for each token, runs without them."""
        for site in self.sites:
            self.after(self._text.layers[site.layer_idx], self._after_layer, for_one_call=True)
            call.capture(self, site, cached=cached)

    def _before_layer(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        brings_states = kwargs.get("cross_attention_states") is not None
        if self._call is None:
            if not brings_states and type(cache_of(kwargs).layers[module.layer_idx]) is not CrossKVLayer:
                return None
            raise UnsupportedCacheError(
                "a cross-attention layer was called outside the model's own forward call; call the model "
                "that was given to compress() (in a training step, leave the block after backward)"
            )
        change = self._receive if brings_states else self._decode
        return args, change(self._call, module, args[0], kwargs)

    def _receive(self, call: _Call, module: Any, text: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return a layer's arguments in prefill: the features that arrive, and a mask of the same width."""
        # Transformers passes no cache to checkpointed layers.
        cache = None if module.training and module.gradient_checkpointing else cache_of(kwargs)
        layer = call.layer_for(cache, module.layer_idx)
        # Images and tiles become columns: [B * images, tiles * patches, C] to [B, S, C].
        states = kwargs["cross_attention_states"]
        states = states.reshape(text.shape[0], -1, states.shape[-1])
        rank, site = self._by_layer[module.layer_idx]
        arrival, states = call.before_layer(rank, layer, states, text)
        mask = call.mask.over(arrival.contents, site)
        return self._masked(call, {**kwargs, "cross_attention_states": states}, mask)

    @staticmethod
    def _masked(call: _Call, kwargs: dict[str, Any], mask: Tensor | None) -> dict[str, Any]:
        row_mask = call.mask.row_mask
        # Otherwise, SDPA without a mask applies causal attention to image columns.
        changed = {"full_text_row_masked_out_mask": row_mask, "is_causal": False}
        return {**kwargs, "cross_attention_mask": mask, **changed}

    def _after_layer(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        assert self._call is not None
        rank, site = self._by_layer[module.layer_idx]
        follows_text = rank < module.layer_idx  # a self-attention layer comes before it
        self._call.after_layer(rank, site, cache_of(kwargs), follows_text=follows_text)

    def _after_inner(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return self.finish_prefill(module, output)

    def last_row(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments for the last token alone, without what brings an image."""
        return last_row(last_text(named), self.family, whole=("cross_attention_mask",))

    def _decode(self, call: _Call, module: Any, text: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return a layer's arguments in a decode step: the cut mask, and keys and values that it can read."""
        cache = cache_of(kwargs)
        layer = open_layer(require_cache(cache), module.layer_idx, call.reader)
        call.attended = layer.contents, layer.columns
        rows, batch = call.mask.rows, text.shape[0]
        if rows is not None and rows.shape[-1] * call.mask.patches != layer.columns:
            raise UnsupportedCacheError(
                f"cross_attention_mask covers {rows.shape[-1]} tiles of {call.mask.patches} columns, but "
                f"the cache has seen {layer.columns} columns; pass a mask over all images so far"
            )
        held = layer.keys.shape[0] * layer.copies
        if batch != held:
            raise UnsupportedCacheError(f"the cache holds {held} rows, but the batch has {batch}")
        if not layer.is_readable and not self.manager.steps.is_active:
            kwargs = with_cache(kwargs, OneLayer.spread(module.layer_idx, layer))
        _, site = self._by_layer[module.layer_idx]
        return self._masked(call, kwargs, call.mask.over(layer.contents, site))

    @property
    def encoding(self) -> nn.Module:
        """The projector after the vision tower."""
        return cast(nn.Module, self._inner.multi_modal_projector)

    def second_call(self, named: Mapping[str, Any], encoding: Any) -> dict[str, Any]:
        """Return the arguments with projected image features instead of pixels."""
        if named.get("pixel_values") is None:
            return dict(named)  # decoding, or no image, or the caller has run the vision tower
        self.keep_pixels(named["pixel_values"])
        states = encoding.reshape(-1, *encoding.shape[-2:])  # [B * images * tiles, patches, C]
        return {**named, "pixel_values": None, "cross_attention_states": states}

    def _before_step(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Let the policy choose what a cross-attention module reads in a decode step."""
        if self._call is None or kwargs.get("cross_attention_states") is not None:
            return None
        rank, site = self._by_layer[module.layer_idx]
        layer = open_layer(require_cache(cache_of(kwargs)), module.layer_idx, self._call.reader)

        def alone(keys: Tensor, values: Tensor) -> OneLayer:
            return OneLayer(module.layer_idx, keys, values)

        return args, stepped(self._call, site, rank, layer, kwargs, alone)

    def geometry(self) -> Mapping[str, object]:
        """Return tiles, patches and vocabulary size, which a guide must share with its target."""
        return guide.geometry(self._inner)

    def question(self, named: Mapping[str, Any]) -> Tensor:
        """Read the text of a prompt without its picture: cross-attention layers are skipped then."""
        return read_question(self._text, named)

    def replay(
        self, prompt: Prompt, answer: Tensor | None = None, written: Tensor | None = None
    ) -> Tensor | None:
        """Run the model on a prompt and an answer, in one forward call that leaves no cache."""
        return guide.replay(self.model, self._inner, prompt, answer, written)

    def answer(self, prompt: Prompt, max_new_tokens: int) -> tuple[Tensor, Tensor]:
        """Generate an answer greedily, from pixels: ``generate`` takes no encoder states."""
        return guide.answer(self.model, prompt, max_new_tokens)

    @classmethod
    def example(cls, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
        """Return a tiny Mllama, and a batch of chats with several images, padding tiles and left padding."""
        return example_mllama(dtype)

    @classmethod
    def probe(cls) -> list[Probe]:
        """Check that transformers has the names and signatures that the hooks use."""
        return mllama_probes()
