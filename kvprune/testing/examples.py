"""A tiny model and a batch for each built-in family: what its adapter's ``example`` returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvprune.testing.tiny import mllama_inputs, tiny_bart, tiny_mllama, tiny_whisper

__all__ = ["bart", "mllama", "whisper"]

Example = tuple[Any, dict[str, Tensor]]


def mllama(dtype: torch.dtype) -> Example:
    """Text before images, an interleaved chat, adjacent images, padding tiles and left padding."""
    return tiny_mllama(1, dtype=dtype), mllama_inputs(["tt1ttt4tt", "t2tt", "14ttt"], 1, dtype)


def bart(dtype: torch.dtype) -> Example:
    """Texts of 12, 7 and 3 tokens."""
    lengths = torch.tensor([[12], [7], [3]])
    mask = (torch.arange(12) < lengths).long()
    ids = torch.randint(4, 60, mask.shape, generator=torch.Generator().manual_seed(0))
    return tiny_bart(1, dtype=dtype), {"input_ids": ids * mask, "attention_mask": mask}


def whisper(dtype: torch.dtype) -> Example:
    """Two sounds of 50 columns each."""
    sounds = torch.randn(2, 8, 100, generator=torch.Generator().manual_seed(0))
    return tiny_whisper(1, dtype=dtype), {"input_features": sounds.to(dtype)}
