"""Forward calls of a model of any family: a prefill with encoder states, and a later turn without."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvprune.adapters.arguments import cache_argument, returned_cache
from kvprune.testing.conformance.common.results import NotApplicable

__all__ = ["forward", "next_turn"]


def forward(model: Any, inputs: dict[str, Tensor], cache: Any = None) -> Any:
    """Run one forward call that brings encoder states, and return the cache: the one given, or a new one."""
    if model.config.is_encoder_decoder and "decoder_input_ids" not in inputs:
        start = torch.full((len(next(iter(inputs.values()))), 1), _start_token(model))
        inputs = {**inputs, "decoder_input_ids": start}
    if cache is not None:
        inputs = {**inputs, **cache_argument(model, cache)}
    return returned_cache(model(**inputs, use_cache=True))


def next_turn(model: Any, inputs: dict[str, Tensor], cache: Any, turn: int) -> None:
    """Run one forward call of two tokens that reads the cache and brings no image.

    Args:
        model: The model.
        inputs: The inputs of the prefill.
        cache: The cache that the prefill filled.
        turn: Number of this turn; the prefill is turn 0.
    """
    if model.config.is_encoder_decoder:  # such a model takes the encoder's input in each call
        tokens = torch.full((len(next(iter(inputs.values()))), 2), _start_token(model))
        forward(model, {**inputs, "decoder_input_ids": tokens}, cache)
        return
    if not {"attention_mask", "cross_attention_mask"} <= set(inputs):
        raise NotApplicable("only for Mllama and encoder-decoder models is it known how to call a later turn")
    mask = inputs["attention_mask"]
    ones = torch.ones(len(mask), 2 * turn, dtype=mask.dtype)
    model(
        input_ids=torch.full((len(mask), 2), 9),
        attention_mask=torch.cat([mask, ones], dim=1),
        cross_attention_mask=inputs["cross_attention_mask"][:, -1:].expand(-1, 2, -1, -1),
        **cache_argument(model, cache),
        use_cache=True,
    )


def _start_token(model: Any) -> int:
    """Return the token with which an encoder-decoder model begins, as `generate` finds it."""
    for settings in (model.generation_config, model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            token = getattr(settings, name, None)
            if isinstance(token, int):
                return token
    raise NotApplicable("the model does not say with which token its decoder starts (decoder_start_token_id)")
