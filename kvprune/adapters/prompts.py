"""Helpers for adapters: make prompts for a guide from the arguments of a forward call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kvprune.adapters.arguments import cache_of
from kvprune.engine.guidance import Prompt
from kvprune.errors import GuideError

__all__ = ["copied_cache", "decoder_prompt", "distinct_rows", "padding_mask", "with_answer"]


def distinct_rows(tensor: Tensor, copies: int) -> Tensor:
    """Return one of each ``copies`` rows of a batch ``[B, ...]``."""
    return tensor[::copies]


def padding_mask(mask: Tensor | Mapping[str, Tensor] | None, length: int) -> Tensor | None:
    """Return the attention mask of a first turn as a padding mask, ``[B, T]``, zero at padding.

    Args:
        mask: ``[B, T]``, or ``[B, 1, T, width]`` (bool or additive), as generation with a static cache makes
            it, or None. Families with layers of several kinds get one mask for each kind, by name.
        length: Number of tokens T.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention")
    if mask is None or mask.ndim != 4:
        return mask
    last = mask[:, 0, length - 1, :length]  # [B, T]: the last token attends to all but padding
    return (last if last.dtype == torch.bool else last == 0).to(torch.int64)


def copied_cache(cache: Any, batch: int, copies: int) -> Any:
    """Return a copy of the cache of earlier turns, with one of each ``copies`` rows; None if it is empty.

    Raises:
        GuideError: If it cannot be copied.
    """
    if cache is None or int(cache.get_seq_length()) == 0:
        return None
    try:
        past = copy.deepcopy(cache)
        if copies > 1:
            past.batch_select_indices(torch.arange(0, batch, copies))
    except (RuntimeError, AttributeError, ValueError) as error:
        raise GuideError(
            f"the guide would read a copy of the cache of earlier turns, but this {type(cache).__name__} "
            f"cannot be copied ({type(error).__name__}: {str(error)[:200]}); start a new conversation"
        ) from error
    return past


def decoder_prompt(named: Mapping[str, Any], length: int, copies: int) -> Callable[[Tensor], Prompt]:
    """Return a function that makes a guide's prompt from a decoder call, given the features of its columns.

    Args:
        named: Arguments of the call by name.
        length: Text rows of the call.
        copies: Consecutive rows of the batch that are equal.

    Raises:
        GuideError: If the decoder has read tokens before it received encoder states.
    """
    cache = cache_of(named)
    if cache is not None and int(cache.get_seq_length()):
        raise GuideError(
            f"the decoder has read {int(cache.get_seq_length())} tokens before it received encoder states, "
            "and a guide would not see them; start with an empty cache"
        )
    mask = padding_mask(named.get("attention_mask"), length)
    arguments = {}
    for name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids"):
        value = mask if name == "attention_mask" else named.get(name)
        if isinstance(value, Tensor):
            arguments[name] = distinct_rows(value, copies)
    if isinstance(named.get("encoder_attention_mask"), Tensor):
        arguments["encoder_attention_mask"] = distinct_rows(named["encoder_attention_mask"], copies)
    # Some decoders view encoder states in another shape, which one of each few rows would not allow.
    return lambda features: Prompt(arguments, features.contiguous())


def with_answer(prompt: Prompt, answer: Tensor, written: Tensor, config: Any) -> dict[str, Tensor]:
    """Return the text arguments of a prompt, followed by every token of an answer but the last.

    The last token is only predicted. The mask hides a token if the one after it does not belong to the
    answer, because what it predicts is no part of the answer.

    Args:
        prompt: Inputs of the target's forward call.
        answer: int64 ``[R, n]``.
        written: bool ``[R, n]``, which tokens belong to the answer; the rest is padding.
        config: The decoder's config.

    Returns:
        ``input_ids`` and ``attention_mask``, and ``position_ids`` if the prompt has any.

    Raises:
        GuideError: If the prompt consists of embeddings, or the decoder has too few positions.
    """
    if "input_ids" not in prompt.arguments:
        raise GuideError(
            "an answer can follow only token ids, but the model was called with inputs_embeds; pass input_ids"
        )
    ids, attended = prompt.arguments["input_ids"], prompt.arguments.get("attention_mask")  # [R, T]
    length = ids.shape[1] + answer.shape[1] - 1
    most = getattr(config, "max_target_positions", None) or getattr(config, "max_position_embeddings", None)
    if isinstance(most, int) and length > most:
        raise GuideError(
            f"a prompt of {ids.shape[1]} tokens and an answer of {answer.shape[1]} take {length} positions, "
            f"but the decoder has {most}; the answer must be shorter"
        )
    if attended is None:
        attended = torch.ones_like(ids)
    arguments = {
        "input_ids": torch.cat([ids, answer[:, :-1]], dim=1),  # [R, T + n - 1]
        "attention_mask": torch.cat([attended, written[:, 1:].to(attended.dtype)], dim=1),
    }
    places = prompt.arguments.get("position_ids")
    if places is not None:
        further = torch.arange(1, answer.shape[1], device=places.device)
        arguments["position_ids"] = torch.cat([places, places[:, -1:] + further], dim=1)
    return arguments
