"""The master oracle (KV13): the untouched model, with dropped columns masked instead of removed.

It shares no code with the cache manager: it only adds the dtype's minimum to the attention masks that the
stock model builds, in the layers and at the steps where a selection says that a column is gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kvprune.adapters.base import ModelAdapter
from kvprune.selection import Selection

__all__ = ["masked_oracle"]


@contextmanager
def masked_oracle(
    model: Any,
    selections: Mapping[int, Selection],
    prefill_selections: Mapping[int, Selection | None],
    *,
    adapter: type[ModelAdapter] | None = None,
) -> Iterator[None]:
    """Run an untouched model so that it attends to selected columns only.

    Args:
        model: A model that nothing compresses: Mllama, or an encoder-decoder one.
        selections: What decoding may attend to, by layer index (``run.selections``).
        prefill_selections: What prefill may attend to, None for everything (``run.prefill_selections``).
        adapter: An `EncoderDecoderAdapter`, for the names that it declares; BART's names by default.
    """
    handles = []

    def restrict(layer_idx: int, states: str, mask_name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            prefill = _is_prefill(kwargs, states, layer_idx)
            selection = prefill_selections[layer_idx] if prefill else selections[layer_idx]
            if selection is None:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            return args, {**kwargs, mask_name: _masked(kwargs.get(mask_name), selection, hidden, module)}

        return hook

    for layer_idx, module, states, mask_name in _sites(model, adapter):
        if layer_idx in selections:
            hook = restrict(layer_idx, states, mask_name)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
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


def _is_prefill(kwargs: dict[str, Any], states: str, layer_idx: int) -> bool:
    if states == "cross_attention_states":
        return kwargs[states] is not None
    cache = kwargs["past_key_values"]
    return cache is None or not cache.is_updated.get(layer_idx)


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
    return mask.masked_fill(dropped[:, :, None].to(mask.device), lowest)
