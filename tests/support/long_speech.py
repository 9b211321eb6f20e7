"""A tiny random Whisper that transcribes recordings longer than its window, and features of recordings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvprune.testing import enliven

WINDOW = 100
"""Frames that the tiny model hears at once: one second, 50 encoder columns."""

LANGUAGES = {"<|en|>": 30, "<|de|>": 31, "<|fr|>": 32}
TASKS = {"translate": 33, "transcribe": 34}
START, PREVIOUS, NO_SPEECH, NO_TIMES = 3, 35, 36, 37
FIRST_TIME, VOCABULARY = 38, 38 + 51
"""Tokens 4 to 29 are text; those from `FIRST_TIME` on say times from 0 to 1 second."""


def long_whisper(
    seed: int = 1, *, dtype: torch.dtype = torch.float64, attn_implementation: str = "sdpa"
) -> Any:
    """Return a random Whisper with timestamps, languages and tasks, in eval mode."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=WINDOW // 2,
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=START,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    config._attn_implementation = attn_implementation
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = enliven(WhisperForConditionalGeneration(config).eval(), seed=seed)
    settings = model.generation_config
    settings._from_model_config = False  # or it would be made from the model's config again
    settings.suppress_tokens = [0, 1, START, *LANGUAGES.values(), *TASKS.values(), PREVIOUS, NO_SPEECH]
    settings.begin_suppress_tokens = None
    settings.is_multilingual = True
    settings.lang_to_id, settings.task_to_id = LANGUAGES, TASKS
    settings.prev_sot_token_id = PREVIOUS
    settings.no_timestamps_token_id = NO_TIMES
    settings.return_timestamps = False
    settings.max_initial_timestamp_index = 10
    settings.alignment_heads = [[0, 0], [1, 1], [2, 2]]
    return model.to(dtype)


def long_features(*frames: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Return noise whose loudness swings, ``[B, 8, longest]``, and which frames each recording has."""
    random = torch.Generator().manual_seed(seed)
    longest = max(frames)
    sounds = torch.randn(len(frames), 8, longest, generator=random, dtype=torch.float64)
    sounds *= 1 + torch.sin(torch.arange(longest) / 17)
    mask = torch.arange(longest)[None] < torch.tensor(frames)[:, None]  # [B, longest]
    return {"input_features": (sounds * mask[:, None]).to(dtype), "attention_mask": mask.long()}
