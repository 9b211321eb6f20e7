"""The common adapter of encoder-decoder models with an ``EncoderDecoderCache`` (BART, Whisper, ...).

These families share one pattern. The first decoder call projects the encoder states, fills
``cross_attention_cache`` and sets a flag for each layer. Later calls get the full encoder states and the full
mask again, but read the cache. So a family is a declaration: the cross-attention module and the names of its
arguments.

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

from kvprune.adapters.arguments import CACHE, cache_of, has_cache, named_arguments, with_cache
from kvprune.adapters.base import ModelAdapter, Site
from kvprune.adapters.call import Call
from kvprune.adapters.column_mask import ColumnMask
from kvprune.adapters.generation import (
    CANDIDATES,
    probe_generation,
    prompt_first,
    running_generation,
)
from kvprune.adapters.probes import Probe, probe_cache, probe_signatures
from kvprune.adapters.prompts import decoder_prompt, with_answer
from kvprune.adapters.rereading import last_row
from kvprune.adapters.text_capture import TextCapture
from kvprune.cache.placement import OneCrossLayer, open_layer, require_cache
from kvprune.cache.reader import Reader
from kvprune.cache.shared_rows import SharedRows, may_share, share_repeated
from kvprune.engine.guidance import Prompt
from kvprune.engine.manager import CrossKVManager
from kvprune.errors import GuideError, UnsupportedCacheError, UnsupportedModelError
from kvprune.tokens.layout import Layout
from kvprune.tokens.randomness import states_fingerprint
from kvprune.tokens.visibility import Visibility, with_last_row

__all__ = ["EncoderDecoderAdapter"]


class _Call(Call):
    """One call of the decoder.

    Args:
        manager: The cache manager.
        reader: Cuts the masks.
        mask: The masks of the call.
    """

    keys_are_raw = True

    def __init__(self, manager: CrossKVManager, reader: Reader, mask: ColumnMask) -> None:
        super().__init__(manager, reader)
        self.mask = mask


class EncoderDecoderAdapter(ModelAdapter):
    """Base class of encoder-decoder families; a subclass declares the names below.

    Class attributes:
        modeling_module: Dotted name of the modeling file, for `probe`.
        attention_class: Class name of the cross-attention module, for `probe`.
        attention: Attribute of a decoder layer that holds the cross-attention module.
        states: Argument of that module for encoder states.
        mask: Argument of that module for the attention mask.
        query: Attribute of that module that projects queries, ``[B, T, Hq * D]``.
        key: Attribute of that module that projects keys, ``[B, S, Hkv * D]``.
        value: Attribute of that module that projects values, ``[B, S, Hkv * D]``.
        self_attention: Attribute of a decoder layer that holds its self-attention, if that is a module of
            the same kind, without rotation or relative positions; else "". Policies see it if `provides`
            has "text".
    """

    provides = ModelAdapter.provides | {"guidance"}
    rereads = True
    modeling_module: ClassVar[str]
    attention_class: ClassVar[str]
    attention: ClassVar[str] = "encoder_attn"
    states: ClassVar[str] = "key_value_states"
    mask: ClassVar[str] = "attention_mask"
    query: ClassVar[str] = "q_proj"
    key: ClassVar[str] = "k_proj"
    value: ClassVar[str] = "v_proj"
    self_attention: ClassVar[str] = ""

    _call: _Call | None  # the current decoder call

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._decoder: Any = model.get_decoder()  # type: ignore[operator]

    @property
    def sites(self) -> Sequence[Site]:
        """The cross-attention of each decoder layer."""
        return [
            Site(layer_idx, getattr(layer, self.attention), self.states, self.mask)
            for layer_idx, layer in enumerate(self._decoder.layers)
        ]

    @property
    def layer_indices(self) -> Sequence[int]:
        """All decoder layers: each has a cross-attention."""
        return range(len(self._decoder.layers))

    @property
    def encoder(self) -> nn.Module:
        """The encoder of the model."""
        found: nn.Module = self.model.get_encoder()  # type: ignore[operator]
        return found

    def attach(self, manager: CrossKVManager) -> None:
        """Hook the decoder's calls and each cross-attention module."""
        self._manager = manager
        self.hook_calls(self._decoder, self._before_decoder, self._after_decoder)
        for site in self.sites:
            self.before(site.module, self._before_attention)
        self.around(self.model, CANDIDATES, prompt_first)

    def _new_call(self) -> _Call:
        return _Call(self.manager, self.reader, ColumnMask(self._decoder.embed_tokens.weight.dtype))

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.begin_call()
        self.spread_weights(self._decoder.config)
        self._call = self._new_call()
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
        generation = running_generation(self.model)
        encoder_mask, columns = named.get("encoder_attention_mask"), states.shape[1]
        cut = encoder_mask is not None and encoder_mask.shape[-1] != columns
        generation.require_whole_prompt(self.family, is_mask_cut=cut)
        tokens = named["input_ids"] if named.get("input_ids") is not None else named["inputs_embeds"]
        decoder_mask = named.get("attention_mask")
        if decoder_mask is not None and decoder_mask.ndim == 2:
            decoder_mask = decoder_mask[:, -tokens.shape[1] :]  # rows of this call only
        masks = encoder_mask, decoder_mask
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
            layout=lambda: Layout.line(columns, states.device),
            prompt=decoder_prompt(named, tokens.shape[1], copies) if "guidance" in needs else None,
        )
        self._hook_layers(call, cached=cached)
        if "text" in needs:
            self._hook_text(call, named.get("attention_mask"), copies, cached=cached)

    def _is_cached(self, named: dict[str, Any]) -> bool:
        """Whether the call has a cache that later calls read."""
        if self._decoder.training and any(layer.gradient_checkpointing for layer in self._decoder.layers):
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
        """Return which columns the text rows may attend: all but padding, the same for all rows."""
        batch, columns = states.shape[:2]
        # Unit 0 has the real columns, unit 1 the padding.
        if encoder_mask is None:
            units = torch.zeros(1, columns, dtype=torch.int64, device=states.device)
        elif encoder_mask.shape == (batch, columns):
            units = (encoder_mask == 0).to(torch.int64)
            # A sample that is nothing but padding keeps its first column, because a row must attend to one.
            units[:, 0] *= (units == 0).any(-1)
        else:
            raise UnsupportedCacheError(
                f"the encoder's attention mask must be [B, S] = [{batch}, {columns}], "
                f"got {list(encoder_mask.shape)}"
            )
        live = torch.ones(batch, tokens.shape[1], dtype=torch.bool, device=states.device)
        if decoder_mask is not None and decoder_mask.ndim == 2:
            live = with_last_row(decoder_mask[:, : live.shape[1]].to(live.device).bool(), live)
        rows = torch.tensor([True, False], device=states.device).expand(batch // copies, 1, 2)
        return Visibility(
            rows=rows,
            units=units if encoder_mask is None else units[::copies],
            images=torch.zeros(2, dtype=torch.int64, device=states.device),
            live=live[::copies],
        )

    def _hook_layers(self, call: _Call, *, cached: bool) -> None:
        """Add the hooks that only prefill needs; decoding runs without them."""
        for site in self.sites:
            attention, heads = site.module, site.module.num_heads
            self.after(attention, self._after_attention, for_one_call=True)
            if "queries" in call.needs:
                call.keep_output(self, getattr(attention, self.query), "queries", heads)
            if not cached:  # else the cache layer has them
                call.keep_output(self, getattr(attention, self.key), "keys", heads)
                call.keep_output(self, getattr(attention, self.value), "values", heads)

    def _hook_text(self, call: _Call, mask: Tensor | None, copies: int, *, cached: bool) -> None:
        """Add the hooks that capture the self-attention of each decoder layer."""
        modules = {
            layer_idx: getattr(layer, self.self_attention)
            for layer_idx, layer in enumerate(self._decoder.layers)
        }
        projections = self.query, self.key, self.value
        name, manager = call.manager.policy.name, call.manager
        capture = TextCapture(
            name, lambda view, _: manager.after_text(view), modules, mask, copies, None, projections
        )
        capture.hook(self, set(modules), cached=cached)

    def _before_attention(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        named = named_arguments(module, args, kwargs)
        cache, states = cache_of(named), named.get(self.states)
        if states is None:
            return None
        if cache is not None and not isinstance(cache, EncoderDecoderCache):
            raise UnsupportedCacheError(
                f"{self.family} must cache cross-attention in an EncoderDecoderCache, "
                f"got {type(cache).__name__}"
            )
        call = self._call or self._new_call()  # attention may be called outside the decoder
        if cache is not None and cache.is_updated.get(module.layer_idx):
            return (), self._decode(call, module, cache, named)
        return (), self._receive(call, module, cache, named)

    def _receive(
        self, call: _Call, module: Any, cache: EncoderDecoderCache | None, named: dict[str, Any]
    ) -> dict[str, Any]:
        """Return a layer's arguments in prefill: the features that arrive, and a mask of the same width."""
        flat = None if cache is None else cache.cross_attention_cache
        layer = call.layer_for(flat, module.layer_idx)
        arrival, states = call.before_layer(
            module.layer_idx, layer, named[self.states], named.get("hidden_states")
        )
        mask = call.mask.over(named.get(self.mask), arrival.contents, module)
        return {**named, self.states: states, self.mask: mask}

    def _after_attention(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        assert self._call is not None
        cache = cache_of(kwargs)
        flat = None if cache is None else cache.cross_attention_cache
        self._call.after_layer(module.layer_idx, module.layer_idx, flat, scaling=module.scaling)

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
        self, call: _Call, module: Any, cache: EncoderDecoderCache, named: dict[str, Any]
    ) -> dict[str, Any]:
        """Return a layer's arguments in a decode step: the cut mask, and keys and values that it can read."""
        layer = open_layer(require_cache(cache.cross_attention_cache), module.layer_idx, call.reader)
        call.attended = layer.contents, layer.columns
        mask = call.mask.over(named.get(self.mask), layer.contents, module)
        if not layer.is_readable:
            named = with_cache(
                named, OneCrossLayer(module.layer_idx, *layer.spread(), cache.self_attention_cache)
            )
        return {**named, self.mask: mask}

    def replay(
        self, prompt: Prompt, answer: Tensor | None = None, written: Tensor | None = None
    ) -> Tensor | None:
        """Run the decoder on a prompt and an answer, without a cache; only a model that guides itself can.

        Returns:
            None, also with an answer. Each family makes logits of the decoder's states in its own way, in the
            outer model (BART adds a bias, T5Gemma caps them), and nobody needs them here.
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
        """Check that transformers has the names that the declaration and the hooks use."""
        cache = EncoderDecoderCache.__init__.__code__.co_names
        missing = [name for name in ("is_updated", "cross_attention_cache") if name not in cache]
        detail = f"lacks {', '.join(missing)}" if missing else "has is_updated and cross_attention_cache"
        return [
            probe_cache(),
            probe_generation(),
            Probe("EncoderDecoderCache", not missing, detail),
            *probe_signatures(cls.modeling_module, {cls.attention_class: (cls.states, cls.mask, CACHE)}),
        ]
