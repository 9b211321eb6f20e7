"""The arguments of `generate` for a question to a cache that was filled before.

A decoder-only model (Llama-3.2-Vision) gets the prompt that the cache has read, followed by the question: so
positions, masks and what `generate` returns are as if all had been read at once. An encoder-decoder model
gets `AbsentStates` in the place of the encoder's output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kvprune.errors import SavedCacheError

__all__ = ["AbsentStates", "encoder_question", "is_absent", "read_inputs", "text_question"]

_TEXT = "input_ids", "attention_mask", "cross_attention_mask"
"""Arguments of a prompt that are saved with the cache of a decoder-only model."""

_OF_SHAPE = ("shape", "device", "dtype", "ndim", "layout", "requires_grad", "is_cuda")
_SHAPE = frozenset(
    (
        *(getattr(Tensor, name).__get__ for name in _OF_SHAPE),
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.__repr__, Tensor.is_floating_point),
        *(Tensor.repeat_interleave, Tensor.index_select, Tensor.to, Tensor.__getitem__, Tensor.is_inference),
    )
)
"""What may be asked of `AbsentStates`: their shape, and some of their rows."""


class AbsentStates(Tensor):
    """Stands for the encoder's output, ``[B, S, 0]``, where a saved cache makes it unnecessary.

    Its shape, dtype and device can be read, and rows be selected. Whatever would compute with it raises.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _SHAPE:
            return Tensor.__torch_function__.__func__(cls, func, types, args, kwargs or {})  # type: ignore[attr-defined]
        raise SavedCacheError(
            f"the encoder's output is not in a saved cache, but {getattr(func, '__name__', func)} reads it; "
            "give generate what it would otherwise ask the encoder for (Whisper: language=... and task=...), "
            "or call the model with its input"
        )


def is_absent(states: object) -> bool:
    """Whether encoder states, or what holds them, are those of a saved cache."""
    return isinstance(getattr(states, "last_hidden_state", states), AbsentStates)


def read_inputs(inputs: Mapping[str, Any], entries: int | None, rows: int, columns: int) -> dict[str, Tensor]:
    """Return what must be saved of the inputs of a prompt.

    Args:
        inputs: Arguments of the call that has read the prompt.
        entries: Text tokens that the cache has read; None for an encoder-decoder model, whose text is not
            saved.
        rows: Rows of the cache B.
        columns: Encoder columns S.

    Raises:
        SavedCacheError: If they do not belong to the cache, or end with padding.
    """
    if entries is None:
        mask = inputs.get("attention_mask")  # of the encoder's input; Whisper and others have none
        if isinstance(mask, Tensor) and mask.shape == (rows, columns):
            return {"attention_mask": mask}
        return {}
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise SavedCacheError(
            "inputs must have the input_ids [B, T] that the cache has read, "
            f"got {sorted(inputs)}; pass what the model was called with"
        )
    if tuple(ids.shape) != (rows, entries):
        raise SavedCacheError(
            f"the cache has read {rows} rows of {entries} tokens, but input_ids is {list(ids.shape)}; save "
            "it before anything is generated, or pass all that it has read (sequences[:, :-1], and masks)"
        )
    kept = {name: inputs[name] for name in _TEXT if isinstance(inputs.get(name), Tensor)}
    mask = kept.get("attention_mask")
    if mask is not None and (tuple(mask.shape) != (rows, entries) or not bool(mask[:, -1].all())):
        raise SavedCacheError(
            f"attention_mask must be {[rows, entries]} as input_ids is, and end with ones: pad on the left "
            f"(tokenizer.padding_side = 'left'); got {list(mask.shape)}"
        )
    if (images := kept.get("cross_attention_mask")) is not None:
        kept["cross_attention_mask"] = images[:, -1:]  # what the rows of a question may attend to
    return kept


def text_question(
    read: Mapping[str, Tensor], tokens: Tensor, mask: Tensor | None, device: torch.device, repeats: int
) -> dict[str, Tensor]:
    """Return input ids and masks of the prompt that was read, followed by a question.

    Args:
        read: What `read_inputs` returned, for 1 or Q rows.
        tokens: int64 ``[Q, n]``, the question.
        mask: ``[Q, n]``, zero at padding; None without padding.
        device: Device of the model.
        repeats: Questions that each row of the cache gets.
    """
    tokens = tokens.to(device)
    ids, attended, images = (
        None if (part := read.get(name)) is None else part.to(device).repeat_interleave(repeats, dim=0)
        for name in _TEXT
    )
    assert ids is not None
    attended = torch.ones_like(ids) if attended is None else attended
    asked = torch.ones_like(tokens) if mask is None else mask.to(attended)
    arguments = {
        "input_ids": torch.cat([ids, tokens], dim=1),
        "attention_mask": torch.cat([attended, asked], dim=1),
    }
    if images is not None:
        length = arguments["input_ids"].shape[1]
        arguments["cross_attention_mask"] = images.expand(-1, length, -1, -1)
    return arguments


def encoder_question(
    read: Mapping[str, Tensor],
    tokens: Tensor | None,
    mask: Tensor | None,
    states: AbsentStates,
    repeats: int,
) -> dict[str, Any]:
    """Return the arguments of an encoder-decoder model: no encoder states, and the decoder's prompt.

    Args:
        read: What `read_inputs` returned.
        tokens: int64 ``[Q, n]``, the decoder's prompt; None if `generate` makes it.
        mask: ``[Q, n]``, zero at padding; None without padding.
        states: Stands for the encoder's output, for each row of the cache.
        repeats: Questions that each row of the cache gets.
    """
    from transformers.modeling_outputs import BaseModelOutput  # slow to import

    arguments: dict[str, Any] = {}
    if (attended := read.get("attention_mask")) is not None:
        arguments["attention_mask"] = attended.to(states.device).repeat_interleave(repeats, dim=0)
    if tokens is not None:
        arguments["decoder_input_ids"] = tokens.to(states.device)
    if mask is not None:
        arguments["decoder_attention_mask"] = mask.to(states.device)
    repeated = states.repeat_interleave(repeats, dim=0)
    return {**arguments, "encoder_outputs": BaseModelOutput(last_hidden_state=repeated)}
