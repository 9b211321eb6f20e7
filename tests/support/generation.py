"""Generating with and without compression, and comparing with the master oracle."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import kvprune
from kvprune.testing import masked_oracle, tiny_bart, tiny_mllama, tiny_whisper

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}

POLICIES = (
    "full",
    "lossless",
    "uniform:keep_ratio=0.3",
    "uniform:keep_ratio=0.3,reach=onward",
    "random:keep_ratio=0.3",
    "random:keep_ratio=0.3,reach=onward",
    "norm:keep_ratio=0.3",
    "norm:of=raw_keys,keep=low,keep_tokens=3",
    "norm:keep_ratio=0.3,reach=onward",
    "trim:k_ratio=0.1",
    "trim:k_ratio=0.1,crop_first=false",
    "trim:keep_ratio=0.3",
)

LAYOUTS = (
    ("4ttt",),
    ("tt1ttt",),
    ("tt4ttt", "t1tt", "tt2tttt"),  # ragged, left padding, padding tiles, rows before the image
    ("tt1ttt4tt",),  # interleaved
    ("tt4tt1tt", "t2tt", "14ttt"),  # several images in some samples, adjacent images in one
    ("tt4tt", "tttt", "2ttt"),  # a sample without an image
)


@functools.cache
def mllama(
    dtype: torch.dtype = torch.float32, attention: str = "sdpa", cross_layers: tuple[int, ...] = (1, 3, 5)
) -> Any:
    return tiny_mllama(1, dtype=dtype, attn_implementation=attention, cross_layers=cross_layers)


@functools.cache
def bart(dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
    return tiny_bart(1, dtype=dtype, attn_implementation=attention)


@functools.cache
def whisper(dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
    return tiny_whisper(1, dtype=dtype, attn_implementation=attention)


def generate(
    model: Any, inputs: dict[str, Any], steps: int = 6, **options: Any
) -> tuple[Tensor, Tensor, Any]:
    """Return sequences, raw logits ``[steps, B, V]`` in the model's dtype, and the cache."""
    options = {"do_sample": False, **options}
    out = model.generate(
        **inputs, max_new_tokens=steps, return_dict_in_generate=True, output_logits=True, **options
    )
    return out["sequences"], torch.stack(list(out["logits"])), out.get("past_key_values")


def difference_to_oracle(model: Any, inputs: dict[str, Any], spec: str, **options: Any) -> float:
    """Return the largest difference in logits between a compressed model and the masked, untouched one."""
    torch.manual_seed(0)  # for sampling: both draw the same
    with kvprune.compress(model, spec) as run:
        sequences, logits, _ = generate(model, inputs, **options)
    torch.manual_seed(0)
    with masked_oracle(model, run.selections, run.prefill_selections):
        expected_sequences, expected, _ = generate(model, inputs, **options)
    assert not logits.isnan().any()
    assert torch.equal(sequences, expected_sequences)
    return float((logits - expected).abs().max())
