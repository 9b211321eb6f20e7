"""Reads the last prompt token again from the pruned cache, before the first answer token is predicted.

A policy decides while the prompt is read, or right after it. So the last row, which predicts the first
answer token, has attended to tokens that are dropped. With ``compress(..., reread=True)``, the last entry of
the text cache is removed when a prefill has completed, and the module that returns the last hidden state is
called once more with the last token alone. This call is an ordinary decode step, and its row replaces the
last one.

`kvprune.adapters.base.ModelAdapter` calls `require_rereadable` before the first layer runs, and
`Rereading.read` after the last one. An adapter says how its arguments for one row look (`last_row`).
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache
from transformers.utils.generic import ModelOutput

from kvprune.adapters.arguments import cache_argument, cache_of, returned_cache, tokens_of, without_cache
from kvprune.adapters.attachment import Attachment
from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.cache.text_layer import TextKVLayer
from kvprune.engine.manager import CrossKVManager
from kvprune.errors import UnsupportedCacheError, UnsupportedModelError

__all__ = ["Rereading", "last_row", "require_rereadable"]

_OF_ENCODER = "image_outputs", "video_outputs", "audio_outputs"
"""Parts of an output that only a call with an image, a video or a sound has; since transformers 5.24."""

_BY_TOKEN = {"input_ids": -1, "inputs_embeds": -2, "position_ids": -1, "cache_position": -1}
"""Arguments with one entry for each token of a call, and the axis of the tokens."""


def last_row(named: Mapping[str, Any], family: str, whole: Collection[str] = ()) -> dict[str, Any]:
    """Return the arguments of a forward call for its last token alone, without the cache.

    Args:
        named: Arguments of the call by name.
        family: Name of the family, for messages.
        whole: Names of tensors that have no text rows, and are passed again as they are.

    Raises:
        UnsupportedModelError: If it is not known how an argument looks for one row.
    """
    row: dict[str, Any] = {}
    for name, value in without_cache(named).items():
        if name in _BY_TOKEN and value is not None:
            row[name] = value.narrow(_BY_TOKEN[name], value.shape[_BY_TOKEN[name]] - 1, 1)
        elif name == "attention_mask" and isinstance(value, Tensor):  # [B, tokens] or [B, 1 or H, T, tokens]
            row[name] = value if value.ndim == 2 else value[:, :, -1:]
        elif name in whole or _has_no_rows(value):
            row[name] = value
        else:
            raise UnsupportedModelError(
                f"reread=True calls {family} again with the last token alone, but nobody says how the "
                f"argument {name!r} ({type(value).__name__}) looks then; leave the argument out, or define "
                "last_row() in the adapter"
            )
    return {**row, "use_cache": True}


def _has_no_rows(value: object) -> bool:
    """Whether an argument is an option, and not data."""
    if isinstance(value, Tensor):
        return not value.ndim
    if isinstance(value, list | tuple):
        return all(map(_has_no_rows, value))
    return value is None or isinstance(value, str | int | float)


def require_rereadable(
    named: Mapping[str, Any], family: str, *, cached: bool, cross_layers: Collection[int] = ()
) -> None:
    """Raise if the last token of a call cannot be read again; called before any layer has run.

    Args:
        named: Arguments of the call by name.
        family: Name of the family, for messages.
        cached: Whether the call has a cache, or the model makes one for it.
        cross_layers: Indices of layers in the text's cache that hold encoder tokens.

    Raises:
        UnsupportedCacheError: If there is no cache, if entries of it cannot be removed, or if the prompt ends
            with padding.
    """
    if not cached:
        raise UnsupportedCacheError(
            f"reread=True reads the last token of each prompt again from the cache, but {family} was called "
            "without one (use_cache=False, or gradient checkpointing); call it with use_cache=True (labels= "
            "turns the cache off: pass decoder_input_ids instead), or leave reread out"
        )
    cache, mask = cache_of(named), named.get("attention_mask")
    if cache is not None:
        tokens = tokens_of(named)
        _require_removable(_text_cache(cache), tokens.shape[1], cross_layers)
    if not isinstance(mask, Tensor):
        return
    if mask.ndim == 4:
        mask = mask[:, 0, -1]
        mask = mask if mask.dtype == torch.bool else mask >= 0
    mask = mask.bool()
    ends = ~mask[:, -1] & mask.any(-1)  # a row that is nothing but padding has no end
    if bool(ends.any()):  # a device transfer, in prefill only
        rows = ends.nonzero().flatten().tolist()
        raise UnsupportedCacheError(
            f"reread=True reads the last token of each prompt again, but rows {rows} of this {family} batch "
            "end with padding; pad on the left (tokenizer.padding_side = 'left')"
        )


def _text_cache(cache: Any) -> Any:
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def _require_removable(cache: Any, arriving: int, cross_layers: Collection[int] = ()) -> None:
    """Raise if the last entry of a text cache cannot be removed after more tokens have arrived."""
    layers = getattr(cache, "layers", None)
    if layers is None or cache.offloading:
        kind = f"a {type(cache).__name__}{' that offloads its layers' if layers is not None else ''}"
        raise UnsupportedCacheError(_not_removable(kind))
    for layer_idx, layer in enumerate(layers):
        if layer_idx in cross_layers or type(layer) in (DynamicLayer, TextKVLayer, CrossKVLayer):
            continue
        if type(layer) is DynamicSlidingWindowLayer:
            tokens = layer.get_seq_length() + arriving
            if tokens < layer.sliding_window:
                continue
            kind = f"a sliding window of {layer.sliding_window} after {tokens} tokens"
        else:
            kind = f"a {type(layer).__name__}"
        raise UnsupportedCacheError(_not_removable(f"{kind}, at layer {layer_idx} of {type(cache).__name__}"))


def _not_removable(kind: str) -> str:
    return (
        f"reread=True removes the last entry of the text cache, which cannot be removed from {kind}; "
        "generate with the default cache, or leave reread out"
    )


@dataclass
class Rereading:
    """The second call of a prefill: the last token alone, read from the pruned cache.

    The call goes through the module itself, so hooks of others run in it as in a decode step. Those that come
    after ours will change what the prefill returns. So that they do not count twice, our hook keeps a copy of
    the `output` as it sees it.

    Args:
        row: Arguments of the call as its caller would pass them, without the cache.
        cache: The cache that was passed to the prefill; None if the model makes one.

    Attributes:
        thread: Identity of the thread that runs the call; None while nobody does.
        output: What the module returned in the call.
    """

    row: dict[str, Any]
    cache: Any
    thread: int | None = field(default=None, init=False)
    output: Any = field(default=None, init=False)

    def keep(self, output: Any) -> None:
        """Keep what the module returned, before hooks that come after ours change it, in place or not."""
        self.output = _copied(output)

    def read(self, attachment: Attachment, manager: CrossKVManager, module: nn.Module, output: Any) -> Any:
        """Read the last token of a prefill again, and return its output with the last row replaced.

        Args:
            attachment: Hooks the model. Hooks that were for the prefill are removed.
            manager: In a prefill, whose layers have all attended.
            module: The module that returned the output.
            output: What it returned: a `ModelOutput` or a tuple.

        Raises:
            UnsupportedCacheError: If the last entry of the text cache cannot be removed.
            UnsupportedModelError: If the output has parts without rows to replace.
        """
        manager.decide()
        attachment.end_of_call()
        parts = output if isinstance(output, tuple) else (returned_cache(output),)
        made = next((part for part in parts if isinstance(part, Cache)), None)
        if self.cache is None or _text_cache(made) is self.cache:  # BLIP adds a cache for encoder tokens
            self.cache = made
        text_cache = _text_cache(self.cache)
        _require_removable(text_cache, 0)
        pruned = [layer for layer in text_cache.layers if isinstance(layer, TextKVLayer)]
        kept = [(layer, layer.slots, layer.valid) for layer in pruned]  # the same afterwards
        for layer in text_cache.layers:
            if isinstance(layer, TextKVLayer):
                layer.remove_last()
            elif layer.is_initialized:  # nothing happens to encoder tokens
                layer.crop(-1)
        self.row |= cache_argument(module, self.cache)
        self.thread = threading.get_ident()
        try:
            module(**self.row)
        finally:
            self.thread = None
        for layer, slots, valid in kept:
            layer.slots, layer.valid = slots, valid
        return _spliced(output, self.output, type(module).__name__)


def _copied(part: Any) -> Any:
    """Return a copy of an output and its tensors; the cache in it is the same."""
    if isinstance(part, Tensor):
        return part.clone()
    if isinstance(part, ModelOutput):
        return type(part)(**{key: _copied(value) for key, value in part.items()})
    return tuple(map(_copied, part)) if isinstance(part, tuple) else part


def _spliced(output: Any, again: Any, name: str) -> Any:
    """Return an output whose last row is that of the second call.

    Args:
        output: A `ModelOutput` or a tuple. Its tensors are ``[..., T, X]``, without those of the encoder.
        again: The same of the second call, with tensors ``[..., 1, X]``.
        name: Class of the module, for messages.

    Raises:
        UnsupportedModelError: If a part of the output has another shape.
    """
    if isinstance(output, ModelOutput) and isinstance(again, ModelOutput):
        once = {key: part for key, part in output.items() if key in _OF_ENCODER and key not in again}
        if output.keys() - once.keys() == again.keys():
            rows = {
                key: output[key]
                if _is_mask(key, output, again)
                else _part(output[key], again[key], name, key)
                for key in again
            }
            return type(output)(**rows, **once)
    if type(output) is tuple and type(again) is tuple:
        shared, rest = output[: len(again)], output[len(again) :]
        if len(shared) == len(again) and all(isinstance(part, ModelOutput) for part in rest):
            pairs = enumerate(zip(shared, again, strict=True))
            return *(_part(*pair, name, f"output {number}") for number, pair in pairs), *rest
    raise UnsupportedModelError(
        f"reread=True replaces the last row of what {name} returns, but it returned {type(output).__name__} "
        f"for the prompt and {type(again).__name__} for its last token, with other parts"
    )


def _is_mask(key: str, output: ModelOutput, again: ModelOutput) -> bool:
    """Whether a part of an output is the mask of all tokens ``[B, T]``, which UDOP returns."""
    return key == "attention_mask" and output[key].shape == again[key].shape


def _part(old: Any, new: Any, name: str, where: str) -> Any:
    if isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new):
        return tuple(_part(*pair, name, where) for pair in zip(old, new, strict=True))
    if isinstance(old, Tensor) and isinstance(new, Tensor) and old.ndim > 2:
        row = old[..., -1:, :]
        if row.shape == new.shape:
            return torch.cat([old[..., :-1, :], new], dim=-2)
    elif type(old) is type(new) and (old is None or isinstance(old, Cache)):
        return new
    raise UnsupportedModelError(
        f"reread=True replaces the last row of what {name} returns, but {where} has none that fits: "
        f"{_shape(old)} for the prompt, {_shape(new)} for its last token; do not ask for it"
    )


def _shape(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
