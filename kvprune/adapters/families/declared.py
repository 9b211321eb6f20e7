"""What a family that is nothing but a declaration inherits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvprune.adapters.encoder_decoder import EncoderDecoderAdapter
from kvprune.adapters.tiny.families import TINY_FAMILIES

__all__ = ["Declared", "LikeBart"]


class Declared(EncoderDecoderAdapter):
    """Makes an example of the first model class."""

    @classmethod
    def example(cls, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
        """Return a tiny model of the first model class, and a batch of two samples, one of them padded."""
        name = cls.model_classes[0]
        return TINY_FAMILIES[name].example(name, dtype)


class LikeBart(Declared):
    """A decoder whose self-attention neither rotates nor adds relative positions, so policies can see it."""

    self_attention = "self_attn"
    provides = EncoderDecoderAdapter.provides | {"text"}
