"""Divides prompts in two: a first part that is prefilled, and last tokens that are decoded after pruning.

A policy that prunes after prefill does not change the first new token, since prefill itself computes it. If
the last tokens of the prompt are decoded after pruning, the first new token depends on what was kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvprune.errors import DataError, UnsupportedModelError

__all__ = ["divide"]

_TEXT = ("input_ids", "attention_mask", "cross_attention_mask", "token_type_ids")
"""Inputs whose second axis counts the tokens of the prompt: ``[B, T, ...]``."""


def divide(inputs: Mapping[str, Any], late: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the inputs of two calls of `generate`.

    The first call gets the picture and all but the last `late` tokens of each prompt. The second gets all
    tokens, as `generate` expects them together with a cache, and no picture.

    Args:
        inputs: What a processor returned for a batch, padded on the left.
        late: How many tokens to leave for the second call, at least 1.

    Raises:
        DataError: If the first call would not get a token that sees its picture.
        UnsupportedModelError: If an input is neither a known text input nor a picture.
    """
    length = inputs["input_ids"].shape[1]
    text = {name: value for name, value in inputs.items() if name in _TEXT}
    pictures = {name: value for name, value in inputs.items() if name not in text}
    _check_names(text, pictures, length)
    _check_late(text, late, length)
    return {**pictures, **{name: value[:, :-late] for name, value in text.items()}}, text


def _check_names(text: Mapping[str, Any], pictures: Mapping[str, Any], length: int) -> None:
    for name in pictures:
        if not name.startswith(("pixel_", "image_", "aspect_ratio_")):
            raise UnsupportedModelError(
                f"late_tokens divides prompts of models that read {', '.join(_TEXT)} and pictures; this one "
                f"also reads {name!r}: use late_tokens=0"
            )
    for name, value in text.items():
        if value.shape[1] != length:
            raise UnsupportedModelError(
                f"late_tokens divides prompts, but {name} has {value.shape[1]} entries for {length} tokens: "
                "use late_tokens=0"
            )


def _check_late(text: Mapping[str, Any], late: int, length: int) -> None:
    """Check that the last token of each first part sees its picture."""
    sees = text["attention_mask"] != 0  # [B, T]
    if "cross_attention_mask" in text:  # [B, T, images, tiles]
        sees = sees & (text["cross_attention_mask"] != 0).flatten(2).any(-1)
    if late >= length or not bool(sees[:, length - late - 1].all()):
        shortest = int(sees.sum(1).min())
        raise DataError(
            f"late_tokens is {late}, but a prompt of this batch has only {shortest} tokens from its "
            "picture on; it must be less than that"
        )
