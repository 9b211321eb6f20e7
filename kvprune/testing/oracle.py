"""The master oracle (KV13): the untouched model, with dropped columns masked instead of removed.

It shares no code with the cache manager. In the layers and at the steps where a selection drops a column, it
adds the dtype's minimum to the attention mask that the stock model builds. All columns stay in the cache.

- Where a policy made new tokens, their features stand in the place of columns before a layer projects them.
- Where a selection merges, kept columns are overwritten with merged ones: the features that enter a layer in
  prefill, and the keys and values that the stock model cached after it.
- Where a selection holds columns in few bits, the layer reads quantized keys and values at these steps.

The numbers come from plain loops in float64, see `kvprune.testing.oracle_arithmetic`. If the last prompt
token is read again, see `kvprune.testing.oracle_rereading`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import EncoderDecoderCache

from kvprune.adapters.arguments import cache_of, named_arguments
from kvprune.adapters.base import ModelAdapter, Site
from kvprune.adapters.encoder_decoder import EncoderDecoderAdapter
from kvprune.adapters.mllama import MllamaAdapter
from kvprune.errors import SelectionError
from kvprune.testing.hooks import temporary
from kvprune.testing.oracle_arithmetic import (
    as_held,
    logit_bias,
    merged_features,
    replaced_features,
    with_merges,
)
from kvprune.testing.oracle_rereading import rereading
from kvprune.testing.oracle_windows import Turns, looking
from kvprune.tokens.replacement import Replacement
from kvprune.tokens.selection import Selection

__all__ = ["masked_oracle"]


class _Inspected(EncoderDecoderAdapter):
    """Finds the sites of an encoder-decoder model whose adapter is not given."""

    family = "this encoder-decoder model"


@contextmanager
def masked_oracle(
    model: Any,
    selections: Mapping[int, Selection] | Sequence[Mapping[int, Selection]],
    prefill_selections: Mapping[int, Selection | None] | Sequence[Mapping[int, Selection | None]],
    *,
    adapter: type[ModelAdapter] | None = None,
    text_selections: Mapping[int, Selection] | None = None,
    prefill_text_selections: Mapping[int, Selection] | None = None,
    reread: bool = False,
    replacements: Mapping[int, Replacement] | Sequence[Mapping[int, Replacement]] | None = None,
) -> Iterator[None]:
    """Run an untouched model so that it attends to selected columns only, merged as the selections say.

    Merged tokens are rounded once, from float64 to the model's dtype, in the model as in the oracle. Logits
    therefore agree as closely as they do without merging.

    A ``generate`` that reads its input window by window, as Whisper reads long recordings, has several
    prefills. Give one mapping for each of them, in order (``run.recording()``). Calls in which Whisper only
    looks at a window, to detect the language or silence, attend to everything and are no prefills.

    Args:
        model: A model that is not compressed: Mllama, or one with an ``EncoderDecoderCache``.
        selections: What decoding may attend to, by layer index (``run.selections``), after each prefill; or a
            list with a mapping for each prefill.
        prefill_selections: What prefill may attend to; None for everything (``run.prefill_selections``); or a
            list with a mapping for each prefill.
        adapter: The model's adapter, whose `sites` are used; by default, they are found by inspection.
        text_selections: Text tokens that decoding may attend to, by layer index (``run.text_selections``).
            Tokens that come later are attended to as well. Mllama only.
        prefill_text_selections: The same for a call that brings an image: what an earlier turn kept.
        reread: Whether the last prompt token is read again, as decoding reads, before an answer begins.
        replacements: New tokens whose features stand in the place of columns in prefill, by layer index
            (``run.replacements``); or a list with a mapping for each prefill.

    Raises:
        SelectionError: If there are lists, and the block has another number of prefills.
    """
    decode, prefill = _listed(selections), _listed(prefill_selections)
    fed = [{}] * len(decode) if replacements is None else _listed(replacements)
    for name, given in ("prefill_selections", prefill), ("replacements", fed):
        if len(decode) != len(given):
            raise SelectionError(
                f"selections are for {len(decode)} prefills, but {name} for {len(given)}; pass one mapping "
                "of each for every prefill"
            )
    turns = Turns(len(decode), repeats=isinstance(selections, Mapping))
    text = text_selections or {}, prefill_text_selections or {}
    if adapter is None:
        adapter = _Inspected if model.config.is_encoder_decoder else MllamaAdapter
    attending = adapter(model)
    sites = attending.sites
    with ExitStack() as stack:
        stack.enter_context(looking(model, turns))
        stack.enter_context(temporary(_hooks(model, sites, decode, prefill, fed, *text, turns)))
        if reread:
            inner = getattr(attending, "decoder", None) or getattr(model, "model", model)
            layers = [site.layer_idx for site in sites]
            stack.enter_context(temporary(rereading(inner, layers, turns)))
        yield
    turns.require_all()


def _listed(given: Any) -> Sequence[Any]:
    """Return what holds for each prefill, of one mapping or of a list."""
    return (given,) if isinstance(given, Mapping) else tuple(given)


def _hooks(
    model: Any,
    sites: Sequence[Site],
    decode: Sequence[Mapping[int, Selection]],
    prefill: Sequence[Mapping[int, Selection | None]],
    fed: Sequence[Mapping[int, Replacement]],
    decode_text: Mapping[int, Selection],
    prefill_text: Mapping[int, Selection],
    turns: Turns,
) -> Iterator[RemovableHandle]:
    known: dict[tuple[Any, ...], list[float]] = {}
    pruned = [site for site in sites if all(site.layer_idx in one for one in decode)]
    for site in pruned:
        at = site.layer_idx
        parts = [(one[at], two[at], new.get(at)) for one, two, new in zip(decode, prefill, fed, strict=True)]
        layer, module = _MaskedLayer(site, parts, known, turns, leads=site is pruned[0]), site.module
        yield module.register_forward_pre_hook(layer.before, with_kwargs=True)
        # Quantization is undone first, so that merging reads the layer's own numbers.
        yield module.register_forward_hook(layer.restore, with_kwargs=True, always_call=True)
        yield module.register_forward_hook(layer.merge, with_kwargs=True)
    for layer_idx in sorted({*decode_text, *prefill_text}):
        text = _MaskedText(layer_idx, decode_text.get(layer_idx), prefill_text.get(layer_idx))
        module = _text_model(model).layers[layer_idx]
        yield module.register_forward_pre_hook(text.before, with_kwargs=True)


def _text_model(model: Any) -> Any:
    return getattr(model, "model", model).language_model


class _MaskedLayer:
    """Hooks of one cross-attention layer.

    Args:
        site: The layer's cross-attention.
        parts: For each prefill, what decoding may attend to after it, what the prefill itself may attend to
            (None for everything), and new tokens that it receives.
        known: Vectors that were quantized before, see `as_held`.
        turns: Says which of the prefills it is.
        leads: Whether this layer is the first that attends in a prefill.
    """

    def __init__(
        self,
        site: Site,
        parts: Sequence[tuple[Selection, Selection | None, Replacement | None]],
        known: dict[tuple[Any, ...], list[float]],
        turns: Turns,
        *,
        leads: bool,
    ) -> None:
        self._site, self._layer_idx = site, site.layer_idx
        self._parts, self._turns, self._leads = parts, turns, leads
        self._decode, self._prefill, self._fed = parts[0]
        self._known = known
        self._in_prefill = False
        self._stock: tuple[Tensor, Tensor] | None = None  # keys and values while quantized ones replace them

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Mask what is dropped; in prefill merge features, in decoding quantize the cache for this call."""
        if self._turns.is_looking:
            self._in_prefill = False
            return None
        named = named_arguments(module, args, kwargs)
        self._in_prefill = self._is_prefill(named)
        if self._in_prefill:
            if self._leads:
                self._turns.begin()
            self._decode, self._prefill, self._fed = self._parts[self._turns.current]
        selection = self._prefill if self._in_prefill else self._decode
        if selection is None:
            return None
        if selection.quantizes:
            self._quantize(self._cache_layer(named), selection)
        site = self._site
        mask = _masked(named.get(site.mask), selection, named["hidden_states"], site)
        changed = {**named, site.mask: mask}
        if self._in_prefill and self._fed is not None:
            changed[site.states] = replaced_features(named[site.states], self._fed)
        if self._in_prefill and selection.merge is not None:
            changed[site.states] = merged_features(changed[site.states], selection)
        return (), changed

    def restore(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Put the stock cache's own numbers back, followed by what the call appended."""
        if self._stock is None:
            return
        layer, (keys, values) = self._cache_layer(kwargs), self._stock
        layer.keys = torch.cat([keys, layer.keys[:, :, keys.shape[2] :]], dim=2)
        layer.values = torch.cat([values, layer.values[:, :, values.shape[2] :]], dim=2)
        self._stock = None

    def merge(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Overwrite kept columns in the cache with merged ones, after prefill."""
        if self._in_prefill and cache_of(kwargs) is not None and self._decode.merge is not None:
            layer = self._cache_layer(kwargs)
            layer.keys = with_merges(layer.keys, self._decode, keys=True)
            layer.values = with_merges(layer.values, self._decode)

    def _is_prefill(self, named: dict[str, Any]) -> bool:
        cache = cache_of(named)
        if isinstance(cache, EncoderDecoderCache):  # the states are given at each step
            return not cache.is_updated.get(self._layer_idx)
        return named.get(self._site.states) is not None

    def _cache_layer(self, kwargs: dict[str, Any]) -> Any:
        """Return the stock cache layer of a call; None if there is no cache, or no such layer yet."""
        cache = cache_of(kwargs)
        layers = getattr(getattr(cache, "cross_attention_cache", cache), "layers", [])
        return layers[self._layer_idx] if self._layer_idx < len(layers) else None

    def _quantize(self, layer: Any, selection: Selection) -> None:
        """Put quantized keys and values in the cache until `restore`."""
        if layer is None or getattr(layer, "keys", None) is None or not layer.keys.numel():
            return
        self._stock = layer.keys, layer.values
        layer.keys, layer.values = (as_held(full, selection, self._known) for full in self._stock)


class _MaskedText:
    """The hook of one self-attention layer of an Mllama.

    Args:
        layer_idx: Index of the layer.
        decode: What calls without an image may attend to; None for everything.
        prefill: What calls with an image may attend to; None for everything.
    """

    def __init__(self, layer_idx: int, decode: Selection | None, prefill: Selection | None) -> None:
        self._layer_idx, self._decode, self._prefill = layer_idx, decode, prefill

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Mask dropped text tokens."""
        selection = self._decode if kwargs["cross_attention_states"] is None else self._prefill
        if selection is None:
            return None
        hidden, mask = args[0], kwargs.get("attention_mask")
        seen = cache_of(kwargs).get_seq_length(self._layer_idx)
        rows, columns = hidden.shape[1], seen + hidden.shape[1]
        if mask is None:
            causal = torch.ones(rows, columns, dtype=torch.bool, device=hidden.device).tril(seen)
            mask = causal.expand(len(hidden), 1, -1, -1)
        mask = _additive(mask, hidden.dtype)  # [B, 1, T, columns]
        dropped = torch.nn.functional.pad(~selection.to_mask(), (0, columns - selection.columns))
        dropped = _by_query_head(dropped, module.self_attn.num_heads)  # [B, 1 or Hq, columns]
        lowest = torch.finfo(mask.dtype).min
        return args, {
            **kwargs,
            "attention_mask": mask.masked_fill(dropped[:, :, None].to(mask.device), lowest),
        }


def _masked(mask: Tensor | None, selection: Selection, hidden: Tensor, site: Site) -> Tensor:
    """Return an additive mask with the dropped columns at the minimum of the dtype."""
    heads = site.heads
    if mask is None:
        rows = 1 if site.mask_by_head else hidden.shape[1]
        shape = (hidden.shape[0], 1, rows, selection.columns)
        mask = torch.zeros(shape, dtype=hidden.dtype, device=hidden.device)
    mask = _additive(mask, hidden.dtype)  # [B, 1 or Hq, T, S]
    if selection.merge is not None:
        mask = mask + logit_bias(selection, heads).to(mask)
    dropped = _by_query_head(~selection.to_mask(), heads)  # [B, 1 or Hq, S]
    mask = mask.masked_fill(dropped[:, :, None].to(mask.device), torch.finfo(hidden.dtype).min)
    if site.mask_by_head:
        mask = mask.expand(-1, heads, -1, -1)
    return mask.as_subclass(_OneForAllHeads) if site.one_mask else mask


class _OneForAllHeads(Tensor):
    """A mask ``[B, Hq, T, S]`` that says that it is ``[B, 1, T, S]``, for modules that ask and refuse."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def size(self, *dim: Any) -> Any:
        """Return the size that such a module wants."""
        return torch.Size((self.shape[0], 1, *self.shape[2:]))


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask that is added to logits, of one that may be bool (True where a row attends)."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def _by_query_head(flags: Tensor, heads: int) -> Tensor:
    """Return flags ``[B, 1 or Hkv, S]`` with one row for each query head, or one row for all of them."""
    return flags if flags.shape[1] == 1 else flags.repeat_interleave(heads // flags.shape[1], dim=1)
