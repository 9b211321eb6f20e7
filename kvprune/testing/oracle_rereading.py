"""The part of the master oracle that reads the last prompt token again (``compress(..., reread=True)``).

After a prefill of the untouched model, the stock text cache loses its last entry, and the last token is read
again in a decode step, in which the oracle masks what was dropped. That step's row replaces the last one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from kvprune.adapters.arguments import cache_argument, cache_of, named_arguments, returned_cache
from kvprune.testing.oracle_windows import Turns

__all__ = ["rereading"]

_OF_IMAGES = "pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_states"


def rereading(inner: Any, cross_layers: Collection[int], turns: Turns) -> Iterator[RemovableHandle]:
    """Hook a module so that each call that brings encoder states is followed by a step for its last token.

    Args:
        inner: The module of an untouched model that returns the last hidden state.
        cross_layers: Indices of the cross-attention layers.
        turns: Says in which calls Whisper only looks at a window; these are no prefills.
    """
    step = _Step(inner, cross_layers, turns)
    yield inner.register_forward_pre_hook(step.before, with_kwargs=True)
    yield inner.register_forward_hook(step.after)


class _Step:
    """One more decode step after each prefill of a module.

    Args:
        inner: The module that returns the last hidden state.
        cross_layers: Indices of the cross-attention layers.
        turns: Says in which calls Whisper only looks at a window.
    """

    def __init__(self, inner: Any, cross_layers: Collection[int], turns: Turns) -> None:
        self._inner, self._cross_layers, self._turns = inner, cross_layers, turns
        self._arguments: dict[str, Any] | None = None  # of a prefill that runs
        self._is_running = False

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the arguments of a call that brings encoder states."""
        if self._is_running or self._turns.is_looking:
            return
        named = named_arguments(module, args, kwargs)
        cache = cache_of(named)
        if named.get("encoder_hidden_states") is not None:  # in each call of an encoder-decoder model
            filled = getattr(cache, "is_updated", {})
            brings = not all(filled.get(layer) for layer in self._cross_layers)
        else:
            brings = any(named.get(name) is not None for name in _OF_IMAGES)
        self._arguments = dict(named) if brings else None

    def after(self, module: Any, args: Any, output: Any) -> Any:
        """Take the last token back, read it again, and put its row in the place of the last one."""
        if self._is_running or self._turns.is_looking or self._arguments is None:
            return None
        named, self._arguments = self._arguments, None
        cache = returned_cache(output)
        text = getattr(cache, "self_attention_cache", None)
        if text is None:  # else it may be around the one that was given, as BLIP's is
            cache = cache_of(named) or cache
        for layer_idx, layer in enumerate((text or cache).layers):
            if text is not None or layer_idx not in self._cross_layers:  # stock would cut image keys as well
                layer.crop(-1)
        for name in list(named):
            if name in _OF_IMAGES or named[name] is cache:
                del named[name]
            elif name in ("input_ids", "inputs_embeds") and named[name] is not None:
                named[name] = named[name][:, -1:]
            elif name == "cross_attention_mask" and named[name] is not None:
                rows = named[name].shape[
                    1
                ]  # those of the whole text stay: transformers 5.17 looks up its own
                named[name] = named[name][:, 0 if rows == cache.get_seq_length() + 1 else -1 :]
            elif name in ("position_ids", "cache_position") and named[name] is not None:
                named[name] = named[name][..., -1:]
        self._is_running = True
        try:
            step = self._inner(**{**named, **cache_argument(self._inner, cache), "use_cache": True})
        finally:
            self._is_running = False
        made = "last_hidden_state" if "last_hidden_state" in output else "logits"  # some decoders go that far
        rows = output[made].clone()
        rows[:, -1] = step[made][:, 0]
        output[made] = rows
        for name in ("hidden_states", "attentions", "cross_attentions"):  # if the model was asked for them
            if output.get(name) is not None:
                output[name] = tuple(map(_with_last_row, output[name], step[name]))
        return output


def _with_last_row(rows: Tensor, step: Tensor) -> Tensor:
    """Return tensors ``[..., T, X]`` of a prefill whose last row is that of a step, ``[..., 1, X]``."""
    return torch.cat([rows[..., :-1, :], step], dim=-2)
