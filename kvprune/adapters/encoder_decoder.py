"""The common adapter of encoder-decoder models with an ``EncoderDecoderCache`` (BART, Whisper, ...).

These families share one pattern. The first decoder call projects the encoder states, fills
``cross_attention_cache`` and sets a flag for each layer. Later calls get the full encoder states and the full
mask again, but read the cache. Where that happens is found by inspection of the model
(`kvprune.adapters.inspection`), so a family is a declaration: its name and its model classes.

The hooks, in the order in which they run:

1. before the decoder: make a `Call`, and begin a prefill if encoder states arrive;
2. before each cross-attention: in prefill, pass only the features that arrive; always, cut the mask;
3. after each cross-attention: put attention weights, if the model returns them, back to their columns;
4. after each cross-attention in prefill: the manager asks the policy;
5. after the decoder: read the last token again if asked, and end the prefill.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache

from kvprune.adapters.arguments import cache_of, has_cache, named_arguments, tokens_of, with_cache
from kvprune.adapters.base import ModelAdapter, Site
from kvprune.adapters.call import Call
from kvprune.adapters.columns.mask import ColumnMask
from kvprune.adapters.columns.texts import Texts
from kvprune.adapters.columns.visibility import column_visibility, require_inputs, rows_of_text
from kvprune.adapters.generation import (
    CANDIDATES,
    probe_generation,
    prompt_first,
)
from kvprune.adapters.inspection import Overrides, find_decoder, find_sites
from kvprune.adapters.probes import Probe, probe_cache
from kvprune.adapters.prompts import decoder_prompt, with_answer
from kvprune.adapters.rereading import last_row
from kvprune.adapters.stepping import follow_text, stepped
from kvprune.adapters.text_capture import TextCapture
from kvprune.adapters.text_sites import TextSite, find_text_sites
from kvprune.cache.placement import OneCrossLayer, open_layer, require_cache
from kvprune.cache.reader import Reader
from kvprune.cache.shared_rows import SharedRows, may_share, share_repeated
from kvprune.engine.guidance import Prompt
from kvprune.engine.manager import CrossKVManager
from kvprune.errors import GuideError, UnsupportedCacheError, UnsupportedModelError
from kvprune.tokens.randomness import states_fingerprint
from kvprune.tokens.visibility import Visibility

__all__ = ["EncoderDecoderAdapter"]


class _Call(Call):
    """One call of the decoder.

    Args:
        manager: The cache manager.
        reader: Cuts the masks.
    """

    def __init__(self, manager: CrossKVManager, reader: Reader) -> None:
        super().__init__(manager, reader)
        self.mask = ColumnMask()


class EncoderDecoderAdapter(Texts):
    """Base class of encoder-decoder families; a subclass declares `family` and `model_classes`.

    Class attributes, to set only where inspection misses something; "" means that inspection finds it:
        attention: Path of the cross-attention module within a decoder layer, such as "encoder_attn".
        states: Argument of that module for encoder states.
        mask: Argument of that module for the attention mask.
        query: Attribute of that module that projects queries, ``[B, T, Hq * D]``.
        key: Attribute of that module that projects keys, ``[B, S, Hkv * D]``.
        value: Attribute of that module that projects values, ``[B, S, Hkv * D]``.
        scaled_by_width: Whether a module that names no ``scaling`` multiplies logits by D ** -0.5.
        self_attention: Path of the self-attention within a decoder layer. Policies see it if `provides` has
            "text".

    Raises:
        UnsupportedModelError: When it is constructed, if the model does not look as expected. The error names
            what was found.
    """

    provides = ModelAdapter.provides | {"guidance"}
    lacks: ClassVar[Mapping[str, str]] = {
        "grid": "its columns are no patches of a picture",
        "question": "its prompt is not read without the encoder (quecc goes without it: query=none)",
        "text_cache": "only the text cache of Mllama can be pruned",
        "class_attention": "only the vision encoder of Mllama shows it",
        "reconstruction": "no text is known that its decoder could repeat",
    }
    rereads = True
    attention: ClassVar[str] = ""
    states: ClassVar[str] = ""
    mask: ClassVar[str] = ""
    query: ClassVar[str] = ""
    key: ClassVar[str] = ""
    value: ClassVar[str] = ""
    scaled_by_width: ClassVar[bool] = False
    self_attention: ClassVar[str] = ""

    _call: _Call | None  # the current decoder call

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        names = self.query, self.key, self.value
        told = Overrides(self.attention, self.states, self.mask, names, self.scaled_by_width)
        found = find_sites(model, self.family, told)
        self._found, self._sites = found, tuple(found.values())
        self._text: Mapping[int, TextSite] = {}
        self._decoder: Any = find_decoder(model, self.family, tuple(found))
        # Of each layer that attends to encoder states: its rank among them, and the module.
        self._by_layer = {site.layer_idx: (rank, site) for rank, site in enumerate(self._sites)}

    @property
    def sites(self) -> Sequence[Site]:
        """The cross-attention modules of the decoder."""
        return self._sites

    @property
    def decoder(self) -> nn.Module:
        """The module whose calls are hooked: the innermost one that takes token ids and encoder states."""
        found: nn.Module = self._decoder
        return found

    @property
    def encoder(self) -> nn.Module | None:
        """The encoder of the model; None if the model does not say which it is."""
        found: nn.Module = self.model.get_encoder()  # type: ignore[operator]
        inside = set(found.modules())  # some models answer with themselves
        return None if any(site.module in inside for site in self.sites) else found

    def attach(self, manager: CrossKVManager) -> None:
        """Hook the decoder's calls and each cross-attention module."""
        self._manager = manager
        if "text" in manager.policy.needs:
            self._text = find_text_sites(
                self.model,
                self._found,
                self.family,
                self.self_attention,
                scaled_by_width=self.scaled_by_width,
            )
        self.hook_calls(self._decoder, self._before_decoder, self._after_decoder)
        for site in self.sites:
            self.before(site.module, self._before_attention)
        for module in self.model.modules():  # BLIP generates with a part of itself
            self.around(module, CANDIDATES, prompt_first)
        self.watch_encoder()
        if "reconstruction" in manager.policy.needs:
            self.watch_text()

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.begin_call()
        self.spread_weights(self._decoder.config)
        self._call = _Call(self.manager, self.reader)
        self._call.returns_weights = self.spreads_weights
        named = named_arguments(module, args, kwargs)
        states, cache = named.get("encoder_hidden_states"), cache_of(named)
        if states is None or (
            isinstance(cache, EncoderDecoderCache) and all(map(cache.is_updated.get, self.layer_indices))
        ):
            return
        if self.is_rereading:
            raise UnsupportedModelError(
                f"reread=True reads the last token again from each layer, but a layer of {self.family} "
                "has read no encoder states"
            )
        self._begin(self._call, named, states)

    def _begin(self, call: _Call, named: dict[str, Any], states: Tensor) -> None:
        """Begin a prefill: tell the manager which columns arrive, and which text rows may attend them."""
        require_inputs(named)
        generation = self._generation_of(self._decoder, is_traced=torch.compiler.is_compiling())
        encoder_mask, columns = named.get("encoder_attention_mask"), states.shape[1]
        cut = encoder_mask is not None and encoder_mask.shape[-1] != columns
        generation.require_whole_prompt(self.family, is_mask_cut=cut)
        tokens = tokens_of(named)
        masks = encoder_mask, rows_of_text(named.get("attention_mask"), tokens.shape[1])
        cached = self._is_cached(named)
        self.prepare_reread(call, named, cached=cached)
        shared_rows = SharedRows()
        if cached and may_share(self._decoder):
            shared_rows = share_repeated(generation.repeats, [tokens, *masks], [states])
        copies, needs = shared_rows.copies, call.needs
        visibility = self._visibility(tokens, states, *masks, copies)
        call.manager.begin(
            visibility,
            columns,
            lambda: states_fingerprint(states[::copies], visibility.decode),
            shared_rows=shared_rows,
            cached=cached,
            layout=lambda: self.layout(states[::copies]),
            prompt=decoder_prompt(named, tokens.shape[1], copies)
            if {"guidance", "reconstruction"} & needs
            else None,
        )
        caps = {site.softcap for site in self.sites} - {None}
        if caps and "queries" in needs:
            call.manager.report.warn(
                f"{self.family} caps attention logits at {caps.pop()}; policies see attention without the cap"
            )
        self._hook_layers(call, cached=cached)
        if "text" in needs:
            self._hook_text(call, named.get("attention_mask"), copies, cached=cached)

    def _is_cached(self, named: dict[str, Any]) -> bool:
        """Whether the call has a cache that later calls read."""
        if self._decoder.training and any(
            getattr(module, "gradient_checkpointing", False) for module in self._decoder.modules()
        ):
            raise UnsupportedModelError(
                f"gradient checkpointing of {self.family} runs the hooks on its attention again in backward, "
                "after the selection was discarded; train without it (gradient_checkpointing_disable)"
            )
        return has_cache(named, self._decoder.config)

    def _visibility(
        self,
        tokens: Tensor,
        states: Tensor,
        encoder_mask: Tensor | None,
        decoder_mask: Tensor | None,
        copies: int,
    ) -> Visibility:
        """Return which columns the text rows may attend; see `column_visibility`."""
        return column_visibility(tokens, states, encoder_mask, decoder_mask, copies)

    def _hook_layers(self, call: _Call, *, cached: bool) -> None:
        """Add the hooks that only prefill needs; decoding runs without them."""
        for site in self.sites:
            self.after(site.module, self._after_attention, for_one_call=True)
            call.capture(self, site, cached=cached)

    def _hook_text(self, call: _Call, mask: Tensor | None, copies: int, *, cached: bool) -> None:
        """Add the hooks that capture the self-attention of each decoder layer."""
        name, manager = call.manager.policy.name, call.manager
        capture = TextCapture(name, lambda view, _: manager.after_text(view), self._text, mask, copies)
        capture.hook(self, set(self._text), cached=cached)

    def _before_attention(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        named = named_arguments(module, args, kwargs)
        rank, site = self._by_layer[module.layer_idx]
        cache, states = cache_of(named), named.get(site.states)
        if states is None:
            if self.manager.in_prefill:
                raise UnsupportedModelError(
                    f"{self.family} calls {type(module).__name__} of layer {site.layer_idx} without "
                    f"{site.states} while it reads a prompt, so it is no cross-attention; set attention in "
                    f"{type(self).__name__} to the path of the cross-attention within a layer"
                )
            return None
        if site.takes_position_bias:  # what a layer before has returned is as wide as what that layer holds
            named = {**named, "position_bias": None}
        if cache is not None and not isinstance(cache, EncoderDecoderCache):
            raise UnsupportedCacheError(
                f"{self.family} must cache cross-attention in an EncoderDecoderCache, "
                f"got {type(cache).__name__}"
            )
        call = self._call or _Call(self.manager, self.reader)  # attention may be called outside the decoder
        if cache is not None and cache.is_updated.get(site.layer_idx):
            return (), self._decode(call, site, cache, named)
        return (), self._receive(call, rank, site, cache, named)

    def _receive(
        self, call: _Call, rank: int, site: Site, cache: EncoderDecoderCache | None, named: dict[str, Any]
    ) -> dict[str, Any]:
        """Return a layer's arguments in prefill: the features that arrive, and a mask of the same width."""
        flat = None if cache is None else cache.cross_attention_cache
        layer, text = call.layer_for(flat, site.layer_idx), named["hidden_states"]
        arrival, states = call.before_layer(rank, layer, named[site.states], text)
        mask = call.mask.over(named.get(site.mask), arrival.contents, site, text)
        return {**named, site.states: states, site.mask: mask}

    def _after_attention(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        assert self._call is not None
        cache = cache_of(kwargs)
        flat = None if cache is None else cache.cross_attention_cache
        rank, site = self._by_layer[module.layer_idx]
        self._call.after_layer(rank, site, flat)

    def _after_decoder(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return self.finish_prefill(module, output)

    def last_row(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments for the last token alone: the encoder's states and mask stay whole."""
        if self._decoder.training and getattr(self._decoder, "layerdrop", 0):
            raise UnsupportedModelError(
                f"reread=True reads the last token again from each layer, but {self.family} skips layers in "
                f"training (layerdrop is {self._decoder.layerdrop}); set it to 0, or call model.eval()"
            )
        return last_row(named, self.family, ("encoder_hidden_states", "encoder_attention_mask"))

    def _decode(
        self, call: _Call, site: Site, cache: EncoderDecoderCache, named: dict[str, Any]
    ) -> dict[str, Any]:
        """Return a layer's arguments in a decode step: the cut mask, and keys and values that it can read."""
        layer = open_layer(require_cache(cache.cross_attention_cache), site.layer_idx, call.reader)
        call.attended = layer.contents, layer.columns
        mask = call.mask.over(named.get(site.mask), layer.contents, site, named["hidden_states"])

        def alone(keys: Tensor, values: Tensor) -> OneCrossLayer:
            return OneCrossLayer(site.layer_idx, keys, values, cache.self_attention_cache)

        if self.manager.steps.is_active:
            rank, _ = self._by_layer[site.layer_idx]
            follow_text(layer, cache.self_attention_cache, len(named["hidden_states"][0]))
            return stepped(call, site, rank, layer, {**named, site.mask: mask}, alone)
        if not layer.is_readable:
            named = with_cache(named, alone(*layer.spread()))
        return {**named, site.mask: mask}

    def replay(
        self, prompt: Prompt, answer: Tensor | None = None, written: Tensor | None = None
    ) -> Tensor | None:
        """Run the decoder on a prompt and an answer, without a cache; only a model that guides itself can.

        Returns:
            None, also with an answer. Each family makes logits of the decoder's states in its own way, in the
            outer model (BART adds a bias, T5Gemma caps them); `kvprune.training` runs it whole for them.
        """
        if prompt.states is None:
            raise GuideError(
                f"a {self.family} model can guide only itself: it needs the encoder states of the target's "
                "call; leave guide out"
            )
        arguments = dict(prompt.arguments)
        if answer is not None and written is not None:
            arguments |= with_answer(prompt, answer, written, self._decoder.config)
        self._decoder(**arguments, encoder_hidden_states=prompt.states, use_cache=False)
        return None

    @classmethod
    def probe(cls) -> list[Probe]:
        """Check that transformers has the cache that these families share; a model is inspected later."""
        cache = EncoderDecoderCache.__init__.__code__.co_names
        missing = [name for name in ("is_updated", "cross_attention_cache") if name not in cache]
        detail = f"lacks {', '.join(missing)}" if missing else "has is_updated and cross_attention_cache"
        return [
            probe_cache(),
            probe_generation(),
            Probe("EncoderDecoderCache", not missing, detail),
        ]
