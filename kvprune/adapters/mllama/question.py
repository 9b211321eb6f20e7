"""Reads the text of a prompt without its picture, for policies that need "question"."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kvprune.adapters.prompts import padding_mask
from kvprune.engine.measurement import Stopwatch
from kvprune.errors import UnsupportedModelError
from kvprune.policy.captured import Captured

__all__ = ["capture_question", "read_question"]


def capture_question(
    text: Any, named: Mapping[str, Any], copies: int, capture: Callable[[], Captured] | None
) -> tuple[Callable[[], Captured], Stopwatch]:
    """Read the question now, before any layer is hooked.

    Args:
        text: The language model.
        named: Arguments of the call by name.
        copies: Consecutive rows of the batch that are equal.
        capture: Returns what else is captured before the first layer; None for nothing.

    Returns:
        A function that returns the question and what ``capture`` returns, and how long it took to read.
    """
    once = {name: value[::copies] for name, value in named.items() if isinstance(value, Tensor)}
    with Stopwatch(text.embed_tokens.weight.device) as watch:
        found = Captured(question=read_question(text, once))
    return lambda: found if capture is None else found.joined(capture()), watch


def read_question(text: Any, named: Mapping[str, Any]) -> Tensor:
    """Return the last hidden state of a pass over a prompt's text alone, ``[R, W]``.

    A prompt that follows earlier turns is read alone, without them: their cache holds pictures.

    Args:
        text: The language model; without encoder states and cache it skips its cross-attention layers.
        named: Arguments of the call by name, for R rows.

    Raises:
        UnsupportedModelError: If the attention mask is not one of padding.
    """
    ids, embeds = named.get("input_ids"), named.get("inputs_embeds")
    tokens = ids if ids is not None else embeds
    assert tokens is not None
    rows, length = tokens.shape[:2]
    mask = padding_mask(named.get("attention_mask"), length)
    if mask is None:
        mask = torch.ones(rows, length, dtype=torch.int64, device=tokens.device)
    if mask.ndim != 2 or mask.shape[1] < length:
        raise UnsupportedModelError(
            f"the question is read with a padding mask [batch, tokens], got one of {list(mask.shape)}; pass "
            "attention_mask as the processor returns it"
        )
    mask = mask[:, -length:]
    places = torch.arange(length, device=mask.device)
    ends = torch.where(mask.bool(), places, 0).amax(-1)  # [R], the last token that is no padding
    with torch.no_grad():
        states = text(
            input_ids=ids,
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=named.get("position_ids"),
            use_cache=False,
        ).last_hidden_state  # [R, T, W]
    found: Tensor = states[torch.arange(rows, device=states.device), ends.to(states.device)]
    return found
