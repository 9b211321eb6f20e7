"""The model families side by side: a model, inputs for it, and what an oracle says about its generation."""

from __future__ import annotations

from typing import Any

import torch
from generation import bart, generate, mllama, whisper
from torch import Tensor
from transformers.models.mllama import modeling_mllama

import kvprune
from kvprune.testing import mllama_inputs

MODELS = {"Mllama": mllama, "BART": bart, "Whisper": whisper}

SPECS = ("full", "trim:keep_ratio=0.3", "norm:keep_ratio=0.3")
"""Nothing pruned, pruned in prefill by heads together, pruned after prefill by each head."""

OLD = not hasattr(modeling_mllama, "_has_cached_cross_attention_states")
"""Whether transformers is so old that its Mllama can neither be compiled nor use a static cache."""

BATCHES = {
    "one": ["tt4ttt"],
    "ragged": ["tt4ttt", "t1tt", "tt2tttt"],
}


def model_of(family: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa") -> Any:
    """Return a cached tiny model; do not change it."""
    return MODELS[family](dtype, attention)


def inputs_of(family: str, batch: str = "ragged", dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Return what a processor would give: one sample, or a ragged batch with padding."""
    if family == "Mllama":
        return mllama_inputs(BATCHES[batch], dtype=dtype)
    random = torch.Generator().manual_seed(0)
    rows = len(BATCHES[batch])
    if family == "Whisper":
        return {"input_features": torch.randn(rows, 8, 100, generator=random, dtype=dtype)}
    ids = torch.randint(4, 60, (rows, 9), generator=random)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, -2 * row :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def compressed(model: Any, inputs: dict[str, Any], spec: str, **options: Any) -> tuple[Tensor, Tensor, Any]:
    """Generate under a policy, from a fixed random state; return sequences, logits and the compression."""
    torch.manual_seed(0)
    with kvprune.compress(model, spec) as run:
        sequences, logits, _ = generate(model, inputs, **options)
    return sequences, logits, run


def rows_so_far(mask: Tensor, before: int) -> Tensor:
    """Return a cross-attention mask as a stock forward call of a later turn wants it.

    Args:
        mask: Of the rows of the call, ``[B, T, images, tiles]``.
        before: Number of rows of earlier turns, which old releases want, too; they do not read them.
    """
    if not OLD:
        return mask
    return torch.cat([mask[:, :1].expand(-1, before, -1, -1), mask], dim=1)
