"""Forward calls of a model of any family: a prefill with encoder states, a later turn, another batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvprune.adapters.arguments import cache_argument, returned_cache
from kvprune.testing.conformance.common.results import NotApplicable

__all__ = [
    "alone",
    "called",
    "encoded",
    "forward",
    "next_turn",
    "start_token",
    "with_repeated_row",
]


def forward(model: Any, inputs: dict[str, Tensor], cache: Any = None) -> Any:
    """Run one forward call that brings encoder states, and return the cache: the one given, or a new one."""
    if cache is not None:
        inputs = {**inputs, **cache_argument(model, cache)}
    return returned_cache(called(model, inputs))


def called(model: Any, inputs: Mapping[str, Any]) -> Any:
    """Run one forward call that brings encoder states, and return what the model returns."""
    if model.config.is_encoder_decoder and "decoder_input_ids" not in inputs:
        batch = len(next(value for value in inputs.values() if isinstance(value, Tensor)))
        inputs = {**inputs, "decoder_input_ids": torch.full((batch, 1), start_token(model))}
    return model(**inputs, use_cache=True)


def encoded(model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Return the inputs with ``encoder_outputs`` in place of what the encoder reads.

    Raises:
        NotApplicable: If the model takes no encoder outputs.
    """
    name = model.main_input_name
    accepted = inspect.signature(type(model).forward).parameters
    if not model.config.is_encoder_decoder or "encoder_outputs" not in accepted or name not in inputs:
        raise NotApplicable(f"a {type(model).__name__} takes no encoder outputs by hand")
    encoder = model.get_encoder()
    read = inspect.signature(type(encoder).forward).parameters
    if unread := sorted(inputs.keys() - read.keys() - {"attention_mask"}):
        raise NotApplicable(
            f"the encoder of a {type(model).__name__} does not read {', '.join(unread)} itself"
        )
    outputs = encoder(**{key: value for key, value in inputs.items() if key in read})
    start = torch.full((len(inputs[name]), 1), start_token(model))
    rest = {key: value for key, value in inputs.items() if key != name}
    return {**rest, "encoder_outputs": outputs, "decoder_input_ids": start}


def alone(inputs: dict[str, Tensor], sample: int) -> dict[str, Tensor]:
    """Cut the inputs to one sample, without the padding that its batch needs."""
    cut = {name: tensor[sample : sample + 1] for name, tensor in inputs.items()}
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is not None and mask is not None and ids.shape == mask.shape:
        real = mask[sample].bool()
        for name, tensor in inputs.items():
            if tensor.shape[:2] == mask.shape:
                cut[name] = cut[name][:, real]
    # In the stock model, a text row before the first image attends to everything, the batch's padding images
    # included. Without these, its hidden states differ, and so does what later layers attend to. So padding
    # images are cut only if there is no such row.
    if "cross_attention_mask" in cut and bool(cut["cross_attention_mask"].flatten(2).any(-1).all()):
        images = int(cut["cross_attention_mask"].any(-1).any(1).sum())
        cut["cross_attention_mask"] = cut["cross_attention_mask"][:, :, :images]
        for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
            cut[name] = cut[name][:, :images]
    return cut


def with_repeated_row(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch with its first sample once more, as the last one."""
    return {name: torch.cat([tensor, tensor[:1]]) for name, tensor in inputs.items()}


def next_turn(model: Any, inputs: dict[str, Tensor], cache: Any, turn: int) -> None:
    """Run one forward call of two tokens that reads the cache and brings no image.

    Args:
        model: The model.
        inputs: The inputs of the prefill.
        cache: The cache that the prefill filled.
        turn: Number of this turn; the prefill is turn 0.
    """
    if model.config.is_encoder_decoder:  # such a model takes the encoder's input in each call
        tokens = torch.full((len(next(iter(inputs.values()))), 2), start_token(model))
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


def start_token(model: Any) -> int:
    """Return the token with which an encoder-decoder model begins, as `generate` finds it."""
    for settings in (model.generation_config, model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            token = getattr(settings, name, None)
            if isinstance(token, int):
                return token
    raise NotApplicable("the model does not say with which token its decoder starts (decoder_start_token_id)")
