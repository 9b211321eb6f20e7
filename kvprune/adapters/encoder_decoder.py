"""Encoder-decoder models that keep encoder states in an ``EncoderDecoderCache`` (BART, Whisper, ...).

All of them share one pattern: the first decoder call projects the encoder states and fills
``cross_attention_cache``; a flag per layer says so; later calls get the full encoder states and the full
mask again, and read the cache. So a family is a declaration: which module attends, and what it calls its
arguments.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache

from kvprune.adapters import tiny
from kvprune.adapters.base import ModelAdapter, has_cache, named_arguments
from kvprune.adapters.column_mask import ColumnMask
from kvprune.adapters.features import gather_features
from kvprune.adapters.probes import Probe, probe_cache, probe_signatures
from kvprune.adapters.prompts import plain_mask, rows_of
from kvprune.adapters.text_capture import TextCapture
from kvprune.cache.copies import Twins, find_twins
from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.cache.placement import OneCrossLayer, open_for_prefill, open_layer, require_cache
from kvprune.engine.guidance import Prompt
from kvprune.engine.manager import CrossKVManager
from kvprune.errors import GuideError, UnsupportedCacheError, UnsupportedModelError
from kvprune.tokens.layout import Layout
from kvprune.tokens.randomness import fingerprint
from kvprune.tokens.visibility import Visibility

__all__ = ["BartAdapter", "EncoderDecoderAdapter", "WhisperAdapter"]


class EncoderDecoderAdapter(ModelAdapter):
    """What the families have in common; a subclass declares the rest.

    Class attributes:
        modeling_module: Dotted name of the modeling file, for `probe`.
        attention_class: Class of the cross-attention module, for `probe`.
        attention: Attribute of a decoder layer that holds it.
        states: Its argument for encoder states.
        mask: Its argument for the attention mask.
        query: Its attribute that projects queries, ``[B, T, Hq * D]``.
        key: Its attribute that projects keys, ``[B, S, Hkv * D]``.
        value: Its attribute that projects values, likewise.
        self_attention: Attribute of a decoder layer that holds its self-attention, if that is a module of
            the same kind, without rotation or relative positions; else "". Policies may look at it if
            `provides` says "text".
    """

    provides = ModelAdapter.provides | {"guidance"}
    modeling_module: ClassVar[str]
    attention_class: ClassVar[str]
    attention: ClassVar[str] = "encoder_attn"
    states: ClassVar[str] = "key_value_states"
    mask: ClassVar[str] = "attention_mask"
    query: ClassVar[str] = "q_proj"
    key: ClassVar[str] = "k_proj"
    value: ClassVar[str] = "v_proj"
    self_attention: ClassVar[str] = ""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._encoder: Any = model.get_encoder()  # type: ignore[operator]
        self._decoder: Any = model.get_decoder()  # type: ignore[operator]
        self._manager: CrossKVManager | None = None
        self._encoded: Tensor | None = None  # what the encoder read last
        self._prompt: int | None = None  # decoder tokens before the drafts of assisted decoding
        self._captured: dict[str, Tensor] = {}
        self._transient: CrossKVLayer | None = None  # stands in for a cache where there is none
        self._mask = ColumnMask(self._decoder.dtype)  # of the decoder call that runs now

    @property
    def layer_indices(self) -> Sequence[int]:
        """All decoder layers: each has a cross-attention."""
        return range(len(self._decoder.layers))

    def attach(self, manager: CrossKVManager) -> None:
        """Hook the encoder's input, the decoder's calls, and each cross-attention module."""
        self._manager = manager
        self.before(self._encoder, self._before_encoder)
        self.before(self._decoder, self._before_decoder)
        self.after(self._decoder, self._after_decoder, always=True)
        for attention in self._attentions():
            self.before(attention, self._before_attention)
        ask = getattr(self.model, "_get_candidate_generator", None)
        if ask is not None:
            # Draft tokens must not vote. These models are not told how many there are, but here it shows.
            # A partial, not a closure: a deep copy of the model gets one of its own.
            noted = functools.partial(self._note_prompt, ask)
            self.override(self.model, "_get_candidate_generator", noted)

    def _attentions(self) -> list[Any]:
        return [getattr(layer, self.attention) for layer in self._decoder.layers]

    def _note_prompt(self, ask: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stand in for the method that starts assisted decoding, which gets the tokens before the drafts."""
        if self.is_aside:
            return ask(*args, **kwargs)
        ids = inspect.signature(ask).bind(*args, **kwargs).arguments.get("input_ids")
        self._prompt = None if ids is None else int(ids.shape[1])
        return ask(*args, **kwargs)

    def _hook_prefill(self, needs: frozenset[str], *, cached: bool) -> None:
        """Add the hooks that only prefill needs."""
        for attention in self._attentions():
            self.after(attention, self._after_attention, for_one_call=True)
            if "queries" in needs:
                self._capture(attention, self.query, "queries")
            if not cached:  # a cache would have told what they are
                self._capture(attention, self.key, "keys")
                self._capture(attention, self.value, "values")

    def _capture(self, attention: Any, projection: str, name: str) -> None:
        heads = attention.num_heads

        def capture(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            self._captured[name] = rearrange(output, "b s (h d) -> b h s d", h=heads)

        self.after(getattr(attention, projection), capture, for_one_call=True)

    def detach(self) -> None:
        """Undo `attach`, and let go of what the encoder read."""
        super().detach()
        self._encoded = None

    def _before_encoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = named_arguments(module, args, kwargs)
        ids = named.get("input_ids")
        if ids is not None and named.get("attention_mask") is not None:
            ids = ids * named["attention_mask"]
        source = ids if ids is not None else named.get("input_features", named.get("inputs_embeds"))
        self._encoded, self._prompt = source, None

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self._manager is not None
        self._mask = ColumnMask(self._decoder.embed_tokens.weight.dtype)
        named = named_arguments(module, args, kwargs)
        states, cache = named.get("encoder_hidden_states"), named.get("past_key_values")
        if states is None or (
            isinstance(cache, EncoderDecoderCache) and all(map(cache.is_updated.get, self.layer_indices))
        ):
            return
        batch, columns = states.shape[:2]
        tokens = named["input_ids"] if named.get("input_ids") is not None else named["inputs_embeds"]
        decoder_mask = named.get("attention_mask")
        if decoder_mask is not None and decoder_mask.ndim == 2:
            decoder_mask = decoder_mask[:, -tokens.shape[1] :]  # earlier text has voted
        masks = named.get("encoder_attention_mask"), decoder_mask
        cached = self._is_cached(named)
        twins = Twins()
        if cached and not torch.is_grad_enabled():
            # Only rows that were repeated after the encoder: Whisper repeats audio for several return
            # sequences before it, and takes the cache apart by these rows afterwards.
            read = None if self._encoded is None else max(1, batch // self._encoded.shape[0])
            twins = find_twins([tokens, *masks], [states], most=read)
        drafts = 0 if self._prompt is None else tokens.shape[1] - self._prompt
        self._prompt = None
        visibility = self._visibility(tokens[:, : tokens.shape[1] - drafts], states, *masks, twins.copies)
        self._manager.begin(
            visibility,
            columns,
            lambda: self._sample_fingerprints(states, batch)[:: twins.copies],
            twins=twins,
            cached=cached,
            layout=lambda: Layout.line(columns, states.device),
            prompt=self._guide_prompt(named, tokens.shape[1], drafts, twins.copies),
        )
        self._hook_prefill(self._manager.policy.needs, cached=cached)
        if "text" in self._manager.policy.needs:
            self._hook_text(named.get("attention_mask"), drafts, twins.copies, cached=cached)

    def _hook_text(self, mask: Tensor | None, drafts: int, copies: int, *, cached: bool) -> None:
        """Capture the self-attention of each decoder layer."""
        assert self._manager is not None
        modules = {
            layer_idx: getattr(layer, self.self_attention)
            for layer_idx, layer in enumerate(self._decoder.layers)
        }
        projections = self.query, self.key, self.value
        name, manager = self._manager.policy.name, self._manager
        capture = TextCapture(
            name, lambda view, _: manager.after_text(view), modules, mask, drafts, copies, None, projections
        )
        capture.hook(self, set(modules), cached=cached)

    def _guide_prompt(
        self, named: dict[str, Any], length: int, drafts: int, copies: int
    ) -> Callable[[Tensor], Prompt] | None:
        """Return what makes the prompt for a guide; None if the policy does not ask for one."""
        assert self._manager is not None
        if "guidance" not in self._manager.policy.needs:
            return None
        cache = named.get("past_key_values")
        if cache is not None and int(cache.get_seq_length()):
            raise GuideError(
                f"the decoder has read {int(cache.get_seq_length())} tokens before its encoder states came, "
                "which its guide would not see; start with an empty cache"
            )
        mask = plain_mask(named.get("attention_mask"), length)
        arguments = {}
        for name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids"):
            value = mask if name == "attention_mask" else named.get(name)
            if isinstance(value, Tensor):
                arguments[name] = rows_of(value, copies, length - drafts)
        if isinstance(named.get("encoder_attention_mask"), Tensor):
            arguments["encoder_attention_mask"] = rows_of(named["encoder_attention_mask"], copies)
        return lambda features: Prompt(arguments, features)

    def replay(
        self, prompt: Prompt, answer: Tensor | None = None, written: Tensor | None = None
    ) -> Tensor | None:
        """Run the decoder over its prompt again; only a model that guides itself has the encoder's states."""
        if prompt.states is None or answer is not None:
            raise GuideError(
                f"{self.family} guides only itself, and only by the decoder's prompt; leave guide out, or "
                "use kvprune.Guide(max_new_tokens=0)"
            )
        self._decoder(**prompt.arguments, encoder_hidden_states=prompt.states, use_cache=False)
        return None

    def _is_cached(self, named: dict[str, Any]) -> bool:
        """Whether what this call projects will be read again."""
        if self._decoder.training and any(layer.gradient_checkpointing for layer in self._decoder.layers):
            raise UnsupportedModelError(
                f"gradient checkpointing of {self.family} runs the hooks on its attention again in backward, "
                "when the selection is gone; train without it (gradient_checkpointing_disable)"
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
        """All rows see the same columns: unit 0 is what the encoder read, unit 1 is padding."""
        batch, columns = states.shape[:2]
        if encoder_mask is None:
            units = torch.zeros(1, columns, dtype=torch.int64, device=states.device)
        elif encoder_mask.shape == (batch, columns):
            units = (encoder_mask == 0).to(torch.int64)
        else:
            raise UnsupportedCacheError(
                f"the encoder's attention mask is [B, S] = [{batch}, {columns}] here, "
                f"got {list(encoder_mask.shape)}"
            )
        live = torch.ones(batch, tokens.shape[1], dtype=torch.bool, device=states.device)
        if decoder_mask is not None and decoder_mask.ndim == 2:
            live &= decoder_mask[:, : live.shape[1]].to(live.device).bool()
        rows = torch.tensor([True, False], device=states.device).expand(batch // copies, 1, 2)
        return Visibility(
            rows=rows,
            units=units if encoder_mask is None else units[::copies],
            images=torch.zeros(2, dtype=torch.int64, device=states.device),
            live=live[::copies],
        )

    def _sample_fingerprints(self, states: Tensor, batch: int) -> Tensor:
        """Fingerprints for the decoder's batch, whose samples may be repeated for beams."""
        source = self._encoded
        if source is None or batch % source.shape[0]:  # encoder_outputs that were made elsewhere
            return fingerprint(states)
        return fingerprint(source).repeat_interleave(batch // source.shape[0])

    def _after_decoder(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        assert self._manager is not None
        if self._manager.in_prefill:
            self._transient = None
            self._captured = {}
            self.end_of_call()
            self._manager.end(completed=output is not None)

    def _before_attention(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        assert self._manager is not None
        named = named_arguments(module, args, kwargs)
        cache, states = named.get("past_key_values"), named.get(self.states)
        if states is None:
            return None
        if cache is not None and not isinstance(cache, EncoderDecoderCache):
            raise UnsupportedCacheError(
                f"cross-attention of {self.family} is cached in an EncoderDecoderCache, "
                f"got {type(cache).__name__}"
            )
        if cache is not None and cache.is_updated.get(module.layer_idx):
            return (), self._decode(module, cache, named)
        return (), self._receive(module, cache, named)

    def _decode(self, module: Any, cache: EncoderDecoderCache, named: dict[str, Any]) -> dict[str, Any]:
        """Return a layer's arguments when it reads what is held."""
        layer = open_layer(require_cache(cache.cross_attention_cache), module.layer_idx)
        mask = self._mask.over(
            named.get(self.mask),
            layer.slots,
            layer.valid,
            ragged=layer.ragged,
            copies=layer.copies,
            module=module,
            bias=layer.bias,
        )
        if not layer.is_readable:
            cache = OneCrossLayer(module.layer_idx, *layer.spread())
        return {**named, self.mask: mask, "past_key_values": cache}

    def _receive(
        self, module: Any, cache: EncoderDecoderCache | None, named: dict[str, Any]
    ) -> dict[str, Any]:
        """Return a layer's arguments when encoder states come: those that survived, and a mask as wide."""
        assert self._manager is not None
        if cache is None:
            layer = self._transient = CrossKVLayer()
        else:
            warn = self._manager.report.warn
            layer = open_for_prefill(cache.cross_attention_cache, module.layer_idx, warn)
        states = named[self.states]
        received = self._manager.before_layer(module.layer_idx, layer, states)
        captures = "features" in self._manager.policy.needs
        if received is None:
            if captures:
                self._captured["features"] = states
            return named
        mask = self._mask.over(
            named.get(self.mask),
            received.indices,
            received.valid,
            ragged=received.is_ragged,
            copies=layer.copies,
            module=module,
        )
        states = gather_features(states, received.repeat(layer.copies))
        if captures:
            self._captured["features"] = states
        return {**named, self.states: states, self.mask: mask}

    def _after_attention(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        manager, captured = self._manager, self._captured
        assert manager is not None
        if self._transient is not None:
            layer = self._transient
            layer.update(captured.pop("keys"), captured.pop("values"))
        else:
            cached = kwargs["past_key_values"].cross_attention_cache.layers[module.layer_idx]
            assert isinstance(cached, CrossKVLayer)
            layer = cached
        # These families have no key norm: what is cached is what was projected.
        raw_keys = layer.spread()[0] if "raw_keys" in manager.policy.needs else None
        manager.after_layer(
            module.layer_idx,
            layer,
            scaling=module.scaling,
            queries=captured.pop("queries", None),
            raw_keys=raw_keys,
            features=captured.pop("features", None),
        )
        self._transient = None

    @classmethod
    def probe(cls) -> list[Probe]:
        """Check the names that the declaration and the hooks rely on."""
        cache = EncoderDecoderCache.__init__.__code__.co_names
        missing = [name for name in ("is_updated", "cross_attention_cache") if name not in cache]
        detail = f"lacks {', '.join(missing)}" if missing else "has is_updated and cross_attention_cache"
        from transformers import GenerationMixin  # here: it takes long to import

        starts = hasattr(GenerationMixin, "_get_candidate_generator")
        return [
            probe_cache(),
            Probe("EncoderDecoderCache", not missing, detail),
            Probe(
                "GenerationMixin",
                starts,
                f"{'has' if starts else 'lacks'} _get_candidate_generator, which tells drafts from prompts",
            ),
            *probe_signatures(
                cls.modeling_module, {cls.attention_class: (cls.states, cls.mask, "past_key_values")}
            ),
        ]


class BartAdapter(EncoderDecoderAdapter):
    """BART."""

    family = "BART"
    model_classes = ("BartForConditionalGeneration", "BartModel")
    modeling_module = "transformers.models.bart.modeling_bart"
    attention_class = "BartAttention"
    self_attention = "self_attn"
    provides = EncoderDecoderAdapter.provides | {"text"}

    @classmethod
    def example(cls, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
        """Return a tiny BART, and texts of several lengths."""
        return tiny.example_bart(dtype)


class WhisperAdapter(EncoderDecoderAdapter):
    """Whisper, whose encoder columns are audio frames."""

    family = "Whisper"
    model_classes = ("WhisperForConditionalGeneration", "WhisperModel")
    modeling_module = "transformers.models.whisper.modeling_whisper"
    attention_class = "WhisperAttention"
    self_attention = "self_attn"
    provides = EncoderDecoderAdapter.provides | {"text"}

    @classmethod
    def example(cls, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
        """Return a tiny Whisper, and two sounds."""
        return tiny.example_whisper(dtype)
