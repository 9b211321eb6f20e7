"""Tiny models of families that do unusual things, as a third party would make them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvprune.testing import enliven

Batch = dict[str, Tensor]


def made(family: Any, config: Any, dtype: torch.dtype) -> Any:
    """Return a random model of a family that does not stop early."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = family(config).eval()
    model.generation_config.eos_token_id = None
    return enliven(model).to(dtype)


def draws(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return random numbers."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


# Moonshine: samples of sound; the encoder takes each 384th entry of the mask.


def tiny_moonshine(dtype: torch.dtype) -> Any:
    """Return a random Moonshine."""
    from transformers import MoonshineConfig, MoonshineForConditionalGeneration

    config = MoonshineConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    return made(MoonshineForConditionalGeneration, config, dtype)


def samples(dtype: torch.dtype) -> Batch:
    """Return two sounds of 12 columns, the second one padded."""
    mask = torch.ones(2, 5000, dtype=torch.long)
    mask[1, 3000:] = 0
    return {"input_values": draws((2, 5000), dtype) * mask, "attention_mask": mask}


# T5Gemma: RMSNorm in float32 in any dtype.


def tiny_t5gemma(dtype: torch.dtype, **changes: Any) -> Any:
    """Return a random T5Gemma."""
    from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration, T5GemmaModuleConfig

    options: Mapping[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 64,
        "layer_types": ["full_attention"] * 2,
        "max_position_embeddings": 128,
        "attn_logit_softcapping": None,
        **changes,
    }
    encoder = T5GemmaModuleConfig(**options)
    decoder = T5GemmaModuleConfig(**options, is_decoder=True, cross_attention_hidden_size=32)
    config = T5GemmaConfig(encoder=encoder, decoder=decoder, vocab_size=64)
    return made(T5GemmaForConditionalGeneration, config, dtype)


def texts(dtype: torch.dtype) -> Batch:
    """Return two texts, the second one padded."""
    ids = torch.randint(4, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}
