"""The adapter for BART, which maps text to text. Encoder columns are text tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvprune.adapters import tiny
from kvprune.adapters.encoder_decoder import EncoderDecoderAdapter

__all__ = ["BartAdapter"]


class BartAdapter(EncoderDecoderAdapter):
    """BART, whose encoder columns are text tokens."""

    family = "BART"
    model_classes = ("BartForConditionalGeneration", "BartModel")
    self_attention = "self_attn"
    provides = EncoderDecoderAdapter.provides | {"text"}

    @classmethod
    def example(cls, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
        """Return a tiny BART, and a batch of texts of several lengths."""
        return tiny.example_bart(dtype)
