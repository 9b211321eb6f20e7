"""The adapter for Whisper, which maps speech to text. Encoder columns are audio frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvprune.adapters import tiny
from kvprune.adapters.encoder_decoder import EncoderDecoderAdapter

__all__ = ["WhisperAdapter"]


class WhisperAdapter(EncoderDecoderAdapter):
    """Whisper, whose encoder columns are audio frames."""

    family = "Whisper"
    model_classes = ("WhisperForConditionalGeneration", "WhisperModel")
    modeling_module = "transformers.models.whisper.modeling_whisper"
    attention_class = "WhisperAttention"
    self_attention = "self_attn"
    provides = EncoderDecoderAdapter.provides | {"text"}

    @classmethod
    def example(cls, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
        """Return a tiny Whisper, and a batch of two sounds."""
        return tiny.example_whisper(dtype)
