"""What a family that is nothing but a declaration inherits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvprune.adapters.encoder_decoder import EncoderDecoderAdapter
from kvprune.adapters.tiny.families import TINY_FAMILIES

__all__ = ["RELATIVE", "REPEATS", "WITH_TEXT", "Declared", "LikeBart", "no_text"]

WITH_TEXT = EncoderDecoderAdapter.provides | {"text"}
"""What a family provides whose self-attention policies can see (`kvprune.adapters.text_sites`)."""


REPEATS = EncoderDecoderAdapter.provides | {"reconstruction"}
"""What a family provides that reads text, and whose decoder writes tokens of the same vocabulary."""


def no_text(reason: str) -> Mapping[str, str]:
    """Return what a family lacks, and why: policies cannot see its text.

    Args:
        reason: As the end of a sentence.
    """
    return {**EncoderDecoderAdapter.lacks, "text": reason}


RELATIVE = no_text("its self-attention adds relative positions to the logits")
"""What T5 and its kin lack."""


class Declared(EncoderDecoderAdapter):
    """Makes an example of the first model class."""

    @classmethod
    def example(cls, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
        """Return a tiny model of the first model class, and a batch of two samples, one of them padded."""
        name = cls.model_classes[0]
        return TINY_FAMILIES[name].example(name, dtype)


class LikeBart(Declared):
    """A decoder with the layers of BART."""

    self_attention = "self_attn"
    provides = REPEATS | {"text"}
