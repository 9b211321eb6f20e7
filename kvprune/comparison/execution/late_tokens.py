"""Divides prompts in two: what is prefilled with the picture, and the last tokens, which are decoded late.

A policy that prunes after prefill leaves the first new token as it is, since that token comes out of prefill.
If the last tokens of the prompt are decoded after pruning, the first new token depends on what was kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvprune.errors import DataError, UnsupportedModelError

__all__ = ["divide"]

_TEXT = ("input_ids", "attention_mask", "cross_attention_mask", "token_type_ids")
"""Inputs with one entry for each token of the prompt, along their second axis."""


def divide(inputs: Mapping[str, Any], late: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the inputs of the first call of `generate`, and those of the second one.

    The first has everything but the last `late` tokens of each prompt; the second has all tokens, as
    `generate` wants them beside a cache, and no picture.

    Args:
        inputs: What a processor made of a batch, padded on the left.
        late: Tokens to leave for the second call, at least 1.

    Raises:
        DataError: If a prompt has no token left that sees its picture.
        UnsupportedModelError: If an input is neither known to be text nor a picture.
    """
    length = inputs["input_ids"].shape[1]
    text = {name: value for name, value in inputs.items() if name in _TEXT}
    for name, value in inputs.items():
        picture = name.startswith(("pixel_", "image_", "aspect_ratio_"))
        if name not in text and not picture:
            raise UnsupportedModelError(
                f"late_tokens divides prompts of models that read {', '.join(_TEXT)} and pictures; this one "
                f"also reads {name!r}: use late_tokens=0"
            )
        if name in text and value.shape[1] != length:
            raise UnsupportedModelError(
                f"late_tokens divides prompts, but {name} has {value.shape[1]} entries for {length} tokens: "
                "use late_tokens=0"
            )
    seen = inputs["attention_mask"] != 0
    if "cross_attention_mask" in inputs:
        seen = seen & (inputs["cross_attention_mask"] != 0).flatten(2).any(-1)
    after = [int(row.sum()) for row in seen]
    if late >= length or not bool(seen[:, length - late - 1].all()):
        raise DataError(
            f"late_tokens is {late}, but a prompt of this batch has only {min(after)} tokens from its "
            "picture on; it must be less than that"
        )
    early = {name: value[:, :-late] for name, value in text.items()}
    return {**{name: value for name, value in inputs.items() if name not in text}, **early}, text
