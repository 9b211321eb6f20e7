"""The master oracle (KV13): the untouched model, with dropped columns masked instead of removed.

It shares no code with the cache manager. It adds the dtype's minimum to the attention masks that the stock
model builds, in the layers and at the steps where a selection says that a column is gone. Where a selection
merges, kept columns are overwritten with what plain loops make of stock's tensors in float64: the features
that enter a layer in prefill, and the keys and values that stock has cached after it. All columns stay.
Where a selection says that a column is held in few bits, the layer reads, at these steps, what plain loops in
float64 make of the keys and values that the stock cache holds there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from kvprune.adapters.base import ModelAdapter
from kvprune.tokens.selection import Selection

__all__ = ["as_held", "masked_oracle", "with_merges"]


@contextmanager
def masked_oracle(
    model: Any,
    selections: Mapping[int, Selection],
    prefill_selections: Mapping[int, Selection | None],
    *,
    adapter: type[ModelAdapter] | None = None,
    text_selections: Mapping[int, Selection] | None = None,
    prefill_text_selections: Mapping[int, Selection] | None = None,
) -> Iterator[None]:
    """Run an untouched model so that it attends to selected columns only, merged as they say.

    What is merged is rounded once, from float64 to the model's dtype, in the model as in the oracle: logits
    agree as closely as they do without merging.

    Args:
        model: A model that nothing compresses: Mllama, or an encoder-decoder one.
        selections: What decoding may attend to, by layer index (``run.selections``).
        prefill_selections: What prefill may attend to, None for everything (``run.prefill_selections``).
        adapter: An `EncoderDecoderAdapter`, for the names that it declares; BART's names by default.
        text_selections: Tokens of the text that decoding may attend to, by layer index
            (``run.text_selections``); later tokens than those they are about are attended to besides. Mllama
            only.
        prefill_text_selections: Likewise for a call that brings an image: what an earlier turn left.
    """
    handles = []
    known: dict[tuple[Any, ...], list[float]] = {}

    def restrict(layer_idx: int, states: str, mask_name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            prefill = _is_prefill(kwargs, states, layer_idx)
            selection = prefill_selections[layer_idx] if prefill else selections[layer_idx]
            if selection is None:
                return None
            if selection.quantizes:
                _swap(_cache_layer(kwargs, layer_idx), selection, known)
            hidden = args[0] if args else kwargs["hidden_states"]
            mask = _masked(kwargs.get(mask_name), selection, hidden, module)
            changed = {**kwargs, mask_name: mask}
            if prefill and selection.merge is not None:
                changed[states] = _merged_features(kwargs[states], selection)
            return args, changed

        return hook

    def overwrite(layer_idx: int, states: str) -> Any:
        arrived: list[bool] = []

        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arrived[:] = [_is_prefill(kwargs, states, layer_idx)]

        def after(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            cache, selection = kwargs["past_key_values"], selections[layer_idx]
            if arrived[0] and cache is not None and selection.merge is not None:
                cached = getattr(cache, "cross_attention_cache", cache).layers[layer_idx]
                cached.keys = with_merges(cached.keys, selection, keys=True)
                cached.values = with_merges(cached.values, selection)

        return before, after

    def restore(layer_idx: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            _swap_back(_cache_layer(kwargs, layer_idx))

        return hook

    for layer_idx, module, states, mask_name in _sites(model, adapter):
        if layer_idx in selections:
            hook = restrict(layer_idx, states, mask_name)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            before, after = overwrite(layer_idx, states)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            # First, so that what is merged is the layer's own numbers.
            put_back = module.register_forward_hook(restore(layer_idx), with_kwargs=True, always_call=True)
            handles += [put_back, module.register_forward_hook(after, with_kwargs=True)]
    if text_selections or prefill_text_selections:
        handles += _restrict_text(model, text_selections or {}, prefill_text_selections or {})
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sites(model: Any, adapter: type[ModelAdapter] | None) -> Iterator[tuple[int, Any, str, str]]:
    """Yield layer index, module, and the names of its states and mask arguments."""
    if model.config.is_encoder_decoder:
        for layer_idx, layer in enumerate(model.get_decoder().layers):
            attention = getattr(layer, getattr(adapter, "attention", "encoder_attn"))
            states = getattr(adapter, "states", "key_value_states")
            yield layer_idx, attention, states, getattr(adapter, "mask", "attention_mask")
        return
    text = getattr(model, "model", model).language_model
    for layer_idx in text.config.cross_attention_layers:
        yield layer_idx, text.layers[layer_idx], "cross_attention_states", "cross_attention_mask"


def _restrict_text(
    model: Any, decode: Mapping[int, Selection], prefill: Mapping[int, Selection]
) -> list[RemovableHandle]:
    """Mask dropped tokens in the self-attention layers of an Mllama; return the hooks that do it."""
    handles = []
    for layer_idx, layer in enumerate(getattr(model, "model", model).language_model.layers):

        def hook(
            module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], layer_idx: int = layer_idx
        ) -> Any:
            selection = (decode if kwargs["cross_attention_states"] is None else prefill).get(layer_idx)
            if selection is None:
                return None
            hidden, mask = args[0], kwargs.get("attention_mask")
            seen = kwargs["past_key_values"].get_seq_length(layer_idx)
            rows, columns = hidden.shape[1], seen + hidden.shape[1]
            if mask is None:
                causal = torch.ones(rows, columns, dtype=torch.bool, device=hidden.device).tril(seen)
                mask = causal.expand(len(hidden), 1, -1, -1)
            if mask.dtype == torch.bool:
                lowest = torch.finfo(hidden.dtype).min
                mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, lowest)
            dropped = torch.nn.functional.pad(~selection.to_mask(), (0, columns - selection.columns))
            heads = module.self_attn.num_heads
            dropped = dropped.repeat_interleave(heads // dropped.shape[1], dim=1)[:, :, None].to(mask.device)
            return args, {**kwargs, "attention_mask": mask.masked_fill(dropped, torch.finfo(mask.dtype).min)}

        if layer_idx in decode or layer_idx in prefill:
            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    return handles


def _is_prefill(kwargs: dict[str, Any], states: str, layer_idx: int) -> bool:
    if states == "cross_attention_states":
        return kwargs[states] is not None
    cache = kwargs["past_key_values"]
    return cache is None or not cache.is_updated.get(layer_idx)


def _cache_layer(kwargs: dict[str, Any], layer_idx: int) -> Any:
    """Return the stock cache layer of a call; None where there is no cache, or no such layer yet."""
    cache = kwargs.get("past_key_values")
    layers = getattr(getattr(cache, "cross_attention_cache", cache), "layers", [])
    return layers[layer_idx] if layer_idx < len(layers) else None


def _swap(layer: Any, selection: Selection, known: dict[tuple[Any, ...], list[float]]) -> None:
    """Let a stock cache layer hold what the selection leaves of its numbers; `_swap_back` undoes it."""
    if layer is None or getattr(layer, "keys", None) is None or not layer.keys.numel():
        return
    layer.kvprune_oracle = layer.keys, layer.values
    layer.keys, layer.values = (as_held(full, selection, known) for full in (layer.keys, layer.values))


def _swap_back(layer: Any) -> None:
    """Let a stock cache layer hold its own numbers again, and what came in the meantime."""
    saved = getattr(layer, "kvprune_oracle", None)
    if saved is None:
        return
    del layer.kvprune_oracle
    keys, values = saved
    layer.keys = torch.cat([keys, layer.keys[:, :, keys.shape[2] :]], dim=2)
    layer.values = torch.cat([values, layer.values[:, :, values.shape[2] :]], dim=2)


def as_held(
    full: Tensor, selection: Selection, known: dict[tuple[Any, ...], list[float]] | None = None
) -> Tensor:
    """Return keys or values as a selection's precision leaves them, by the definition, in plain loops.

    Args:
        full: ``[B, Hkv, S, D]``, as stock holds them.
        selection: Of these columns or more. What it drops or holds in the own dtype stays as it is.
        known: What was computed before, so that equal vectors are computed once.
    """
    known = {} if known is None else known
    bits = selection.bits_by_column().tolist()
    held = full.detach().to(torch.float64).clone()
    for sample, heads in enumerate(held.tolist()):
        for head, columns in enumerate(heads):
            widths = bits[sample][head if len(bits[sample]) > 1 else 0]
            for column, vector in enumerate(columns):
                if widths[column] == 16:
                    continue
                key = (widths[column], *vector)
                if key not in known:
                    known[key] = _quantized(vector, widths[column])
                held[sample, head, column] = torch.tensor(known[key], dtype=torch.float64)
    return held.to(full.dtype)


def _quantized(vector: list[float], bits: int) -> list[float]:
    """Return each number as the nearest of evenly spaced levels between the ends of its group.

    A group is as many neighbouring channels as divide the vector evenly, at most 64; the whole vector where
    that would be fewer than 16.
    """
    size = max(size for size in range(1, 65) if len(vector) % size == 0)
    size = len(vector) if size < 16 else size
    levels: list[float] = []
    for first in range(0, len(vector), size):
        group = vector[first : first + size]
        step = (max(group) - min(group)) / (2**bits - 1)
        for number in group:
            code = round((number - min(group)) / step) if step else 0
            levels.append(min(group) + code * step)
            if abs(levels[-1] - number) > step * 0.500001:  # what users are promised
                raise AssertionError(f"{number} became {levels[-1]} with steps of {step}")
    return levels


def _masked(mask: Tensor | None, selection: Selection, hidden: Tensor, module: Any) -> Tensor:
    """Return an additive mask with the dropped columns at the minimum of the dtype."""
    dropped = ~selection.to_mask()
    heads = getattr(module, "num_heads", None) or module.cross_attn.num_heads
    if dropped.shape[1] > 1:
        dropped = dropped.repeat_interleave(heads // dropped.shape[1], dim=1)
    if mask is None:
        shape = (hidden.shape[0], 1, hidden.shape[1], selection.columns)
        mask = torch.zeros(shape, dtype=hidden.dtype, device=hidden.device)
    lowest = torch.finfo(hidden.dtype).min
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, lowest)
    if selection.merge is not None:
        mask = mask + _bias(selection, heads).to(mask)
    return mask.masked_fill(dropped[:, :, None].to(mask.device), lowest)


def _bias(selection: Selection, heads: int) -> Tensor:
    """Return what is added to the logits of kept columns, ``[B, 1 or heads, 1, S]`` in float64."""
    merge = selection.merge
    assert merge is not None
    batch, own_heads, _ = selection.indices.shape
    bias = torch.zeros(batch, own_heads, selection.columns, dtype=torch.float64)
    for sample in range(batch):
        for head in range(own_heads):
            into = merge.into[sample, head].tolist()
            for position, column in _entries(selection, sample, head):
                carried = 0.0 if merge.carried is None else float(merge.carried[sample, head, position])
                size = into.count(position) if merge.size_bias else 1
                bias[sample, head, column] = carried + math.log(size)
    if own_heads > 1:
        bias = bias.repeat_interleave(heads // own_heads, dim=1)
    return bias[:, :, None]


def _entries(selection: Selection, sample: int, head: int) -> list[tuple[int, int]]:
    """Position and column of each kept entry of one head."""
    columns = selection.indices[sample, head].tolist()
    valid = selection.valid[sample, head].tolist()
    return [
        (position, column) for position, (column, real) in enumerate(zip(columns, valid, strict=True)) if real
    ]


def _merged_features(states: Tensor, selection: Selection) -> Tensor:
    """Overwrite the features of kept columns, in the shape in which they came."""
    by_sample = states.reshape(len(selection.indices), 1, -1, states.shape[-1])
    return with_merges(by_sample, selection, first=selection.columns - by_sample.shape[2]).reshape(
        states.shape
    )


def with_merges(full: Tensor, selection: Selection, *, keys: bool = False, first: int = 0) -> Tensor:
    """Return tokens of all columns, those of kept ones overwritten with what a selection merges into them.

    Args:
        full: ``[B, Hkv, S, D]``.
        selection: With a merge; what it says of columns before ``first`` is left out.
        keys: Whether these are keys, whose length may be restored.
        first: The column with which ``full`` begins.
    """
    merge = selection.merge
    assert merge is not None
    changed = full.clone()
    own_heads = selection.indices.shape[1]
    for sample in range(full.shape[0]):
        for head in range(full.shape[1]):
            own = min(head, own_heads - 1)
            into = merge.into[sample, own].tolist()
            for position, anchor in _entries(selection, sample, own):
                members = [column for column, entry in enumerate(into) if entry == position]
                if anchor < first:
                    continue
                total = torch.zeros(full.shape[-1], dtype=torch.float64, device=full.device)
                length = share = 0.0
                for column in members:
                    weight = float(merge.weights[sample, own, column])
                    token = full[sample, head, column - first].double()
                    total = total + weight * token
                    length += abs(weight) * float(token.norm())
                    share += abs(weight)
                if keys and merge.renormalize_keys and share > 0 and float(total.norm()) > 0:
                    total = total / float(total.norm()) * (length / share)
                changed[sample, head, anchor - first] = total.to(full.dtype)
    return changed
