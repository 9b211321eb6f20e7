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
        encoder_layers=1,
        decoder_layers=2,
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
    settings.alignment_heads = [[0, 0], [1, 1]]
    return model.to(dtype)


def long_features(*frames: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Return noise whose loudness swings, ``[B, 8, longest]``, and which frames each recording has."""
    random = torch.Generator().manual_seed(seed)
    longest = max(frames)
    sounds = torch.randn(len(frames), 8, longest, generator=random, dtype=torch.float64)
    sounds *= 1 + torch.sin(torch.arange(longest) / 17)
    mask = torch.arange(longest)[None] < torch.tensor(frames)[:, None]  # [B, longest]
    return {"input_features": (sounds * mask[:, None]).to(dtype), "attention_mask": mask.long()}


PROMPT = torch.tensor([PREVIOUS, 7, 8, 9])

USES: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "long": (long_features(150), {}),
    "batch": (long_features(190, 130, 60), {}),
    "short": (long_features(100), {}),
    "words": (long_features(100), {"return_timestamps": False, "return_token_timestamps": True}),
    "long words": (long_features(150, 120), {"return_token_timestamps": True}),
    "detection": (long_features(150, 120), {"language": None}),
    "prompt": (long_features(150), {"prompt_ids": PROMPT}),
    "prompt of all": (
        long_features(150),
        {"prompt_ids": PROMPT, "prompt_condition_type": "all-segments", "condition_on_prev_tokens": True},
    ),
    "text before": (long_features(150, 120), {"condition_on_prev_tokens": True}),
    "fallback": (
        long_features(150, 120),
        {
            "temperature": (0.0, 0.6, 1.0),
            "logprob_threshold": -0.6,
            "compression_ratio_threshold": 1.35,
            "no_speech_threshold": 0.6,
        },
    ),
    "silence": (
        long_features(150, 120),
        {"temperature": (0.0, 0.6), "logprob_threshold": -0.6, "no_speech_threshold": 1e-4},
    ),
    "beams": (long_features(150, 120), {"num_beams": 3}),
    "sequences": (long_features(150, 120), {"do_sample": True, "num_return_sequences": 2}),
    "assistant": (long_features(100), {"assistant_model": None}),  # made anew for each call
    "lookup": (long_features(150), {"prompt_lookup_num_tokens": 3}),
    "static": (long_features(190, 90), {"cache_implementation": "static"}),
}
"""Ways to transcribe: features, and options of ``generate``."""


def transcribe(model: Any, use: str, **more: Any) -> dict[str, Any]:
    """Return all that ``generate`` says about a use, from a fixed random state."""
    features, options = USES[use]
    plain = {"language": "en", "task": "transcribe", "max_new_tokens": 8, "return_timestamps": True}
    options = {**plain, "return_dict_in_generate": True, "return_segments": True, **options, **more}
    if "assistant_model" in options:
        options["assistant_model"] = long_whisper(5)
    torch.manual_seed(3)
    found: dict[str, Any] = model.generate(
        **{name: one.clone() for name, one in features.items()}, output_logits=True, **options
    )
    return found


def apart(one: Any, other: Any) -> float:
    """Return the largest difference between the numbers of two outputs of the same form, without caches."""
    ones, others = _numbers(one), _numbers(other)
    assert [part.shape for part in ones] == [part.shape for part in others]
    assert ones
    pairs = zip(ones, others, strict=True)
    gaps = [torch.where(a == b, 0, (a.double() - b.double()).abs()) for a, b in pairs if a.numel()]
    assert not any(bool(gap.isnan().any()) for gap in gaps)
    return max(float(gap.max()) for gap in gaps)


def _numbers(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = [value[name] for name in sorted(value) if name != "past_key_values"]
    return [part for one in value for part in _numbers(one)] if isinstance(value, list | tuple) else []
