"""Llama-3.2-Vision (class Mllama in transformers).

Image features are projected to keys and values in a few decoder layers and cached in the ordinary flat
cache. Columns are image-major, then tile, then patch, so the unit of visibility is the tile of an image.

The hooks, in the order in which they run in a forward call (`docs/hooks.md` has the picture):

1. before the whole model: how many rows at the end are draft tokens;
2. before ``MllamaModel``: keep the raw mask from being expanded to one column per patch, and begin a prefill
   if an image comes along;
3. before each cross-attention layer: put our cache layer in place, pass on only features that survived,
   and give it a mask as wide as what it holds;
4. after each cross-attention layer in prefill: the manager decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
import transformers
from einops import rearrange
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from kvprune.adapters import tiny
from kvprune.adapters.base import ModelAdapter, has_cache, named_arguments
from kvprune.adapters.class_attention import ClassAttention
from kvprune.adapters.features import gather_features
from kvprune.adapters.probes import Probe, probe_cache, probe_signatures
from kvprune.adapters.prompts import copied_cache, plain_mask, rows_of
from kvprune.adapters.text_capture import TextCapture
from kvprune.adapters.text_mask import fit_text_mask
from kvprune.adapters.tile_mask import TileMask
from kvprune.cache.copies import Twins, find_twins
from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.cache.placement import (
    OneLayer,
    open_for_prefill,
    open_layer,
    open_text_layer,
    require_cache,
)
from kvprune.engine.guidance import Prompt
from kvprune.engine.manager import CrossKVManager
from kvprune.errors import GuideError, UnsupportedCacheError, UnsupportedModelError
from kvprune.policy.text_view import TextView
from kvprune.tokens.layout import Layout
from kvprune.tokens.randomness import fingerprint
from kvprune.tokens.visibility import Visibility

__all__ = ["MllamaAdapter"]

_TEXT = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cross_attention_mask")
_IMAGE = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


class MllamaAdapter(ModelAdapter):
    """``MllamaForConditionalGeneration`` and ``MllamaModel``.

    Class attributes:
        class_attention_layer: The encoder in the vision tower ("transformer", or "global_transformer", which
            follows it), and the layer in it, whose class tokens `View.class_attention` shows. By default the
            last: its output is what the text model receives. That is what the second last layer of CLIP is to
            LLaVA. The text model also receives five intermediate layers of the first encoder, none of which
            stands for all. Derive a class to look at another layer.
    """

    family = "Llama-3.2-Vision (Mllama)"
    model_classes = ("MllamaForConditionalGeneration", "MllamaModel")
    provides = ModelAdapter.provides | {"text", "text_cache", "guidance", "class_attention"}
    class_attention_layer: ClassVar[tuple[str, int]] = ("global_transformer", -1)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        # The outer model holds the inner one as `.model`; the inner one holds vision and language models.
        self._inner = cast(Any, model if hasattr(model, "language_model") else model.get_submodule("model"))
        self._text = cast(Any, self._inner.language_model)
        self._layer_indices: list[int] = sorted(self._text.config.cross_attention_layers)
        self._drafts = 0
        self._mask: TileMask | None = None  # of the forward call that runs now
        self._captured: dict[str, Tensor] = {}
        self._transient: CrossKVLayer | None = None  # stands in for a cache where there is none
        self._manager: CrossKVManager | None = None

    @property
    def layer_indices(self) -> Sequence[int]:
        """Indices of the cross-attention layers (3, 8, 13, ... in Llama-3.2-11B-Vision)."""
        return self._layer_indices

    def attach(self, manager: CrossKVManager) -> None:
        """Hook the model's forward calls (see the head of this file)."""
        self._manager = manager
        if self._inner is not self.model:
            self.before(self.model, self._before_outer)
        self.before(self._inner, self._before_inner)
        self.after(self._inner, self._after_inner, always=True)
        for layer_idx in self._layer_indices:
            layer = self._text.layers[layer_idx]
            self.before(layer, self._before_layer)
            # Without it, SDPA takes a missing mask to mean causal attention over image columns.
            self.override(layer.cross_attn, "is_causal", False)

    def _hook_prefill(self, needs: frozenset[str], *, cached: bool) -> None:
        """Add the hooks that only prefill needs: decoding, which runs for each token, does without them."""
        for layer_idx in self._layer_indices:
            layer = self._text.layers[layer_idx]
            self.after(layer, self._after_layer, for_one_call=True)
            if "queries" in needs:
                self.after(layer.cross_attn.q_norm, self._after_q_norm, for_one_call=True)
            if "raw_keys" in needs:
                self.before(layer.cross_attn.k_norm, self._before_k_norm, for_one_call=True)
            if not cached:  # a cache would have told what they are
                self.after(layer.cross_attn.k_norm, self._after_k_norm, for_one_call=True)
                self.after(layer.cross_attn.v_proj, self._after_v_proj, for_one_call=True)

    def _before_outer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep = named_arguments(module, args, kwargs).get("logits_to_keep", 0)
        # Assisted decoding verifies draft tokens: it asks for their logits and for one more.
        self._drafts = keep - 1 if isinstance(keep, int) and keep > 1 else 0

    def _before_inner(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = named_arguments(module, args, kwargs)
        drafts, self._drafts = self._drafts, 0
        mask = named.get("cross_attention_mask")
        tokens = named["input_ids"] if named.get("input_ids") is not None else named.get("inputs_embeds")
        if tokens is None:
            return args, kwargs  # the model itself says what is missing
        batch, length = tokens.shape[:2]
        text_mask = fit_text_mask(named.get("past_key_values"), named.get("attention_mask"), batch, length)
        named = {**named, "attention_mask": text_mask}
        patches = self._inner.vision_model.num_patches
        rows = None if mask is None else self._rows(mask, length, named.get("past_key_values"))
        # The dtype of one weight: asking the model for its dtype walks over all of them.
        self._mask = TileMask(rows, patches, self._text.embed_tokens.weight.dtype)
        pixels, states = named.get("pixel_values"), named.get("cross_attention_states")
        if pixels is not None or states is not None:
            if named.get("past_key_values") is not None:
                require_cache(named["past_key_values"])  # refuse before any layer has run
            self._begin(named, batch, length, drafts)
        # Named now, so that positional arguments and the mask's removal go together.
        return (), {**named, "cross_attention_mask": None}

    def _rows(self, mask: Tensor, length: int, cache: Any) -> Tensor:
        """Return which tile of which image each of the ``length`` rows may attend, bool ``[B, T, U]``."""
        if mask.ndim != 4:
            raise UnsupportedCacheError(
                "cross_attention_mask is [B, T, images, tiles] as the processor makes it, "
                f"got {list(mask.shape)}"
            )
        if mask.shape[1] != length:  # a plain forward call may pass the rows of the whole conversation
            seen = int(cache.get_seq_length()) if cache is not None else 0
            missing = seen + length - mask.shape[1]
            if missing > 0:  # draft tokens in older releases; new rows repeat the last one, as in generate
                mask = torch.cat([mask, mask[:, -1:].expand(-1, missing, -1, -1)], dim=1)
            mask = mask[:, seen : seen + length]
        return (mask == 1).flatten(2)

    def _begin(self, named: dict[str, Any], batch: int, length: int, drafts: int) -> None:
        """Tell the manager that an image arrives, and what each text row may attend."""
        assert self._mask is not None
        assert self._manager is not None
        pixels, states = named.get("pixel_values"), named.get("cross_attention_states")
        source = cast(Tensor, pixels if pixels is not None else states)
        patches, rows = self._mask.patches, self._mask.rows
        if pixels is not None:
            new_units = pixels.shape[1] * pixels.shape[2]
        else:
            new_units = source[..., 0].numel() // (batch * patches)
        if rows is None:
            rows = torch.ones(batch, 1, new_units, dtype=torch.bool, device=source.device)
        if source.shape[0] != batch:
            source = rearrange(source, "(b i) p c -> b i p c", b=batch)
        cached = self._is_cached(named)
        # Later images join what is held already; gradients need each row on its own.
        sharable = cached and rows.shape[-1] == new_units and not torch.is_grad_enabled()
        twins = self._twins(named, source) if sharable else Twins()
        live = rows.any(-1).expand(-1, length).clone()
        attention_mask = named.get("attention_mask")
        if attention_mask is not None and attention_mask.ndim == 2:
            live &= attention_mask[:, -length:].to(live.device).bool()
        if drafts:
            rows = rows[:, : length - drafts] if rows.shape[1] > 1 else rows
            live = live[:, : length - drafts]
        units = torch.arange(rows.shape[-1], device=rows.device)
        visibility = Visibility(
            rows=rows[:: twins.copies],
            units=units.repeat_interleave(patches)[None],
            images=units // self._inner.vision_model.max_num_tiles,
            live=live[:: twins.copies],
        )
        self._manager.begin(
            visibility,
            new_units * patches,
            lambda: fingerprint(source[:: twins.copies]),
            twins=twins,
            cached=cached,
            layout=self._layout(named, twins.copies),
            prompt=self._prompt(named, batch, length, drafts, twins.copies),
            class_attention=self._class_attention(named, twins.copies),
        )
        self._hook_prefill(self._manager.policy.needs, cached=cached)
        if {"text", "text_cache"} & self._manager.policy.needs:
            self._hook_text(named.get("attention_mask"), drafts, twins.copies, cached=cached)

    def _hook_text(self, mask: Tensor | None, drafts: int, copies: int, *, cached: bool) -> None:
        """Capture the self-attention before each cross-attention layer, or all if text is pruned."""
        manager = self._manager
        assert manager is not None
        prunes = cached and "text_cache" in manager.policy.needs
        if prunes and 0 in self._layer_indices:
            raise UnsupportedModelError(
                f"policy {manager.policy.name!r} prunes text, but the first layer of this decoder is a "
                "cross-attention layer, by which transformers measures text; use a policy that does not"
            )
        modules = {
            layer_idx: layer.self_attn
            for layer_idx, layer in enumerate(self._text.layers)
            if layer_idx not in self._layer_indices
        }
        before = {max((i for i in modules if i < cross), default=-1) for cross in self._layer_indices}

        def done(view: TextView, cache: Cache | None) -> None:
            layer = open_text_layer(cache, view.layer_idx) if prunes and cache is not None else None
            manager.after_text(view, layer)

        capture = TextCapture(manager.policy.name, done, modules, mask, drafts, copies, _rotate)
        capture.hook(self, set(modules) if prunes else before - {-1}, cached=cached)

    def _class_attention(self, named: dict[str, Any], copies: int) -> Callable[[], Tensor] | None:
        """Capture what class tokens attend to, if the policy needs it."""
        assert self._manager is not None
        policy = self._manager.policy
        if "class_attention" not in policy.needs:
            return None
        ratios, tiles = named.get("aspect_ratio_ids"), named.get("aspect_ratio_mask")
        if named.get("pixel_values") is None:
            raise UnsupportedModelError(
                f"policy {policy.name!r} needs view.class_attention, which only the vision tower knows, and "
                "that does not run where cross_attention_states are passed; pass pixel_values, "
                "aspect_ratio_ids and aspect_ratio_mask instead"
            )
        if ratios is None or tiles is None:
            return None  # the model itself says what is missing
        encoder, number = self.class_attention_layer
        vision = self._inner.vision_model
        attention = ClassAttention(
            policy.name,
            getattr(vision, encoder).layers[number].self_attn,
            vision.num_patches,
            (ratios > 0)[..., None] & tiles.bool(),
            copies,
        )
        attention.hook(self)
        return attention.by_column

    def _layout(self, named: dict[str, Any], copies: int) -> Callable[[], Layout] | None:
        """Return what tells where the new columns lie in their images; None if nobody says."""
        ratios, tiles = named.get("aspect_ratio_ids"), named.get("aspect_ratio_mask")
        if ratios is None:
            return None
        vision = self._inner.vision_model
        grid = vision.image_size // vision.patch_size

        def layout() -> Layout:
            # Pairs of height and width, in tiles; the ids count from one, and zero is no image.
            supported = vision.config.supported_aspect_ratios
            widths = torch.tensor([0, *(width for _, width in supported)], device=ratios.device)
            return Layout.tiles(
                grid,
                widths[ratios[::copies]],
                vision.max_num_tiles,
                class_token=True,
                exists=None if tiles is None else tiles[::copies].bool(),
            )

        return layout

    def _prompt(
        self, named: dict[str, Any], batch: int, length: int, drafts: int, copies: int
    ) -> Callable[[Tensor], Prompt] | None:
        """Return what makes the prompt for a guide; None if the policy does not ask for one."""
        assert self._manager is not None
        if "guidance" not in self._manager.policy.needs:
            return None
        # Copied now: by the time the guide is asked, the first layers have read this turn's text.
        past = copied_cache(named.get("past_key_values"), batch, copies)
        attended = named.get("attention_mask")
        given = {**named, "attention_mask": attended if past is not None else plain_mask(attended, length)}
        arguments = {}
        for name in (*_TEXT, *_IMAGE):
            value = given.get(name)
            if isinstance(value, Tensor):
                # Drafts come last, in whatever has a place for each of them.
                ends = drafts if name in _TEXT and value.shape[1] >= length else 0
                arguments[name] = rows_of(value, copies, value.shape[1] - ends if ends else None)
        return lambda features: Prompt(arguments, features, past)

    def geometry(self) -> Mapping[str, object]:
        """Tiles, patches and vocabulary: with the same ones, columns and token ids mean the same."""
        vision = self._inner.vision_model
        return {
            "image size": vision.image_size,
            "patch size": vision.patch_size,
            "tiles per image": vision.max_num_tiles,
            "columns per tile": vision.num_patches,
            "tile arrangements": [list(pair) for pair in vision.config.supported_aspect_ratios],
            "vocabulary": self._text.config.vocab_size,
        }

    def replay(
        self, prompt: Prompt, answer: Tensor | None = None, written: Tensor | None = None
    ) -> Tensor | None:
        """Run the model over a prompt and an answer, in one forward call that leaves no cache."""
        arguments: dict[str, Any] = dict(prompt.arguments)
        if prompt.states is not None:  # the vision tower has run
            arguments = {name: arguments[name] for name in _TEXT if name in arguments}
            arguments["cross_attention_states"] = prompt.states
        else:
            self._require_pixels(prompt)
        arguments |= {"past_key_values": prompt.past, "use_cache": prompt.past is not None}
        if answer is None or written is None:
            self._inner(**arguments)
            return None
        length, more = prompt.text.shape[1], answer.shape[1] - 1
        arguments["input_ids"] = torch.cat([arguments["input_ids"], answer[:, :-1]], dim=1)
        attended = arguments.get("attention_mask")
        if attended is None:
            attended = torch.ones_like(prompt.text)
        arguments["attention_mask"] = torch.cat([attended, written[:, 1:].to(attended.dtype)], dim=1)
        places = arguments.get("position_ids")
        if places is not None:
            further = places[:, -1:] + torch.arange(1, more + 1, device=places.device)
            arguments["position_ids"] = torch.cat([places, further], dim=1)
        # As a tensor: a number would mean that the other rows are drafts.
        rows = torch.arange(length - 1, length + more, device=answer.device)
        logits: Tensor = self.model(**arguments, logits_to_keep=rows).logits
        return logits

    def answer(self, prompt: Prompt, max_new_tokens: int) -> tuple[Tensor, Tensor]:
        """Generate greedily; the vision tower runs again, because generation cannot take its output."""
        self._require_pixels(prompt)
        if prompt.past is not None or "input_ids" not in prompt.arguments:
            raise GuideError(
                "a guide generates from token ids of a whole conversation, got "
                f"{'a later turn' if prompt.past is not None else 'inputs_embeds'}; use max_new_tokens=0"
            )
        generator: Any = self.model
        if not getattr(generator, "can_generate", lambda: False)():
            raise GuideError(
                f"{type(generator).__name__} does not generate, but the guide's max_new_tokens is "
                f"{max_new_tokens}; use 0, or give the model with its language head"
            )
        arguments = {name: tensor for name, tensor in prompt.arguments.items() if name != "position_ids"}
        arguments.setdefault("attention_mask", torch.ones_like(prompt.text))
        plain = dict.fromkeys(("temperature", "top_p", "top_k"))  # would only warn
        out = generator.generate(
            **arguments,
            **plain,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            return_dict_in_generate=False,
        )
        new = out[:, prompt.text.shape[1] :]
        ends = generator.generation_config.eos_token_id
        ends = torch.tensor([ends] if isinstance(ends, int) else list(ends or []), device=new.device)
        over = torch.isin(new, ends).cumsum(-1)
        return new, (over - torch.isin(new, ends).to(over.dtype)) == 0

    def _require_pixels(self, prompt: Prompt) -> None:
        if "pixel_values" not in prompt.arguments:
            raise GuideError(
                "a guide reads pixel_values, but the model was called with cross_attention_states, which "
                "belong to its own vision tower; pass pixel_values and aspect_ratio_ids"
            )

    def _is_cached(self, named: dict[str, Any]) -> bool:
        """Whether what this call projects will be read again."""
        if self._text.training and any(layer.gradient_checkpointing for layer in self._text.layers):
            if "__call__" in GradientCheckpointingLayer.__dict__:
                raise UnsupportedModelError(
                    f"gradient checkpointing in transformers {transformers.__version__} runs the hooks of a "
                    "layer again in backward, when the selection is gone; 5.23.0 does not, or train without "
                    "it (gradient_checkpointing_disable)"
                )
            return False  # transformers takes the cache away from checkpointed layers
        return has_cache(named, self._text.config)

    @staticmethod
    def _twins(named: dict[str, Any], source: Tensor) -> Twins:
        names = (
            "input_ids",
            "attention_mask",
            "aspect_ratio_ids",
            "aspect_ratio_mask",
            "cross_attention_mask",
        )
        return find_twins([named.get(name) for name in names], [source, named.get("inputs_embeds")])

    def _after_inner(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        assert self._manager is not None
        self._mask = None
        if self._manager.in_prefill:
            self._transient = None
            self._captured = {}
            self.end_of_call()
            self._manager.end(completed=output is not None)

    def _before_layer(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._mask is None:
            if kwargs.get("cross_attention_states") is None:
                return None
            raise UnsupportedCacheError(
                "a cross-attention layer received encoder states outside the model's own forward call; call "
                "the model that was given to compress() (in a training step, leave the block after backward)"
            )
        if kwargs.get("cross_attention_states") is None:
            return args, self._decode(module, args[0].shape[0], kwargs)
        return args, self._receive(module, args[0].shape[0], kwargs)

    def _decode(self, module: Any, batch: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return a layer's arguments when it reads what is held."""
        assert self._mask is not None
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        if not isinstance(layer, CrossKVLayer):  # filled before the compression began
            layer = open_layer(require_cache(kwargs["past_key_values"]), module.layer_idx)
        rows = self._mask.rows
        if rows is not None and rows.shape[-1] * self._mask.patches != layer.columns:
            raise UnsupportedCacheError(
                f"cross_attention_mask covers {rows.shape[-1]} tiles of {self._mask.patches} columns, but "
                f"the cache has seen {layer.columns} columns; pass a mask over all images so far"
            )
        if batch != layer.keys.shape[0] * layer.copies:
            raise UnsupportedCacheError(
                f"the cache holds {layer.keys.shape[0] * layer.copies} rows, but the batch has {batch}"
            )
        if not layer.is_readable:
            kwargs = {**kwargs, "past_key_values": OneLayer.spread(module.layer_idx, layer)}
        return self._masked(module, kwargs, self._mask.over_layer(layer, module.cross_attn))

    def _receive(self, module: Any, batch: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return a layer's arguments when encoder features come: those that survived, and a mask as wide."""
        assert self._mask is not None
        assert self._manager is not None
        layer = self._layer_for(module, kwargs.get("past_key_values"))
        # Images and tiles become columns: [B * images, tiles * patches, C] to [B, S, C].
        states = kwargs["cross_attention_states"]
        states = states.reshape(batch, -1, states.shape[-1])
        rank = self._layer_indices.index(module.layer_idx)
        received = self._manager.before_layer(rank, layer, states)
        expected = layer.expected(states.shape[1])
        slots, valid = expected if expected is not None else (None, None)
        ragged = layer.ragged or (received is not None and received.is_ragged)
        if received is not None:
            states = gather_features(states, received.repeat(layer.copies))
        if "features" in self._manager.policy.needs:
            self._captured["features"] = states
        mask = self._mask.over(
            slots,
            valid,
            ragged=ragged,
            copies=layer.copies,
            module=module.cross_attn,
            bias=None if slots is None else layer.expected_bias(slots.shape[-1]),
        )
        return self._masked(module, {**kwargs, "cross_attention_states": states}, mask)

    def _masked(self, module: Any, kwargs: dict[str, Any], mask: Tensor | None) -> dict[str, Any]:
        assert self._mask is not None
        row_mask = self._mask.row_mask
        return {**kwargs, "cross_attention_mask": mask, "full_text_row_masked_out_mask": row_mask}

    def _layer_for(self, module: Any, cache: Any) -> CrossKVLayer:
        """Return what holds a layer's keys and values: in the cache, or for this call only."""
        if cache is None or (module.training and module.gradient_checkpointing):
            self._transient = CrossKVLayer()
            return self._transient
        assert self._manager is not None
        return open_for_prefill(cache, module.layer_idx, self._manager.report.warn)

    def _after_layer(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        manager, captured = self._manager, self._captured
        assert manager is not None
        if self._transient is not None:
            layer = self._transient
            layer.update(captured.pop("keys"), captured.pop("values"))
        else:
            layer = kwargs["past_key_values"].layers[module.layer_idx]
        rank = self._layer_indices.index(module.layer_idx)
        manager.after_layer(
            rank,
            layer,
            scaling=module.cross_attn.scaling,
            queries=captured.pop("queries", None),
            raw_keys=captured.pop("raw_keys", None),
            features=captured.pop("features", None),
            follows_text=rank < module.layer_idx,  # some layer before it is no cross-attention layer
        )
        self._transient = None

    def _after_q_norm(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        self._captured["queries"] = output

    def _before_k_norm(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        self._captured["raw_keys"] = args[0]

    def _after_k_norm(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        self._captured["keys"] = output

    def _after_v_proj(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        heads = self._text.config.num_key_value_heads
        self._captured["values"] = rearrange(output, "b s (h d) -> b h s d", h=heads)

    @classmethod
    def example(cls, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
        """Return a tiny Mllama, and chats with several images, padding tiles and left padding."""
        return tiny.example_mllama(dtype)

    @classmethod
    def probe(cls) -> list[Probe]:
        """Check the names and signatures that the hooks rely on."""
        signatures = probe_signatures(
            "transformers.models.mllama.modeling_mllama",
            {
                "MllamaForConditionalGeneration": ("logits_to_keep", "cross_attention_mask", "pixel_values"),
                "MllamaModel": ("cross_attention_mask", "cross_attention_states", "past_key_values"),
                "MllamaTextModel": ("full_text_row_masked_out_mask", "cross_attention_states"),
                "MllamaCrossAttentionDecoderLayer": (
                    "cross_attention_states",
                    "cross_attention_mask",
                    "past_key_values",
                ),
                "MllamaTextCrossAttention": ("cross_attention_states", "attention_mask", "past_key_values"),
                "MllamaTextSelfAttention": ("position_embeddings", "past_key_values"),
                "MllamaVisionAttention": ("attention_mask",),
            },
        )
        from transformers.models.mllama import modeling_mllama  # here: it takes long to import

        rotates = hasattr(modeling_mllama, "apply_rotary_pos_emb")
        rotary = f"{'has' if rotates else 'lacks'} apply_rotary_pos_emb"
        return [probe_cache(), *signatures, Probe("modeling_mllama", rotates, rotary)]


def _rotate(queries: Tensor, keys: Tensor, named: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Rotate as ``MllamaTextSelfAttention`` does."""
    from transformers.models.mllama.modeling_mllama import apply_rotary_pos_emb

    cos, sin = named["position_embeddings"]
    rotated: tuple[Tensor, Tensor] = apply_rotary_pos_emb(queries, keys, cos, sin)
    return rotated
