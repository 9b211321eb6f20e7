"""Lets Whisper write down what it hears, from encoder states: greedily, in the language that it detects."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvprune.adapters.arguments import returned_cache
from kvprune.adapters.reconstruction import Writing
from kvprune.engine.guidance import Prompt
from kvprune.errors import GuideError

__all__ = ["transcribe"]


def transcribe(model: Any, decoder: Any, prompt: Prompt, max_new_tokens: int) -> Writing:
    """Write a transcript of each sound, without time stamps.

    After the start token alone, the model names the language. The tokens that ask for a transcript follow,
    as the generation config of the model has them, so they are the first tokens of the text that is returned.
    With more than the start token, the text follows what is given.

    Args:
        model: A ``WhisperForConditionalGeneration``.
        decoder: Its decoder.
        prompt: Start token, encoder states, and what else the decoder reads first.
        max_new_tokens: Most tokens.

    Raises:
        GuideError: If the decoder has too few positions for one token.
    """
    settings, ids, states = model.generation_config, prompt.text, prompt.states
    limit = min(max_new_tokens, int(model.config.max_target_positions) - ids.shape[1])
    if limit < 1:
        raise GuideError(
            f"a prompt of {ids.shape[1]} tokens leaves no position for a transcript: the decoder has "
            f"{model.config.max_target_positions}; shorten prompt_ids"
        )
    last, cache = _read(decoder, ids, states, None)
    tokens: list[Tensor] = []  # each [R]
    if ids.shape[1] == 1:
        tokens = _opening(settings, model.proj_out(last))[:limit]
    calls = 1
    if tokens:
        last, cache = _read(decoder, torch.stack(tokens, dim=1), states, cache)
        calls += 1
    ends = _ids(settings.eos_token_id, ids.device)
    over = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    written = [~over for _ in tokens]
    first = len(tokens)
    while len(tokens) < limit and not bool(over.all()):
        if len(tokens) > first:
            last, cache = _read(decoder, tokens[-1][:, None], states, cache)
            calls += 1
        logits = model.proj_out(last).float()  # [R, V]
        for name in ("suppress_tokens", *(["begin_suppress_tokens"] if len(tokens) == first else [])):
            logits[:, _ids(getattr(settings, name, None), ids.device)] = -torch.inf
        written.append(~over)
        tokens.append(logits.argmax(-1).masked_fill(over, 0))
        over = over | torch.isin(tokens[-1], ends)
    return Writing(torch.stack(tokens, 1), torch.stack(written, 1), calls, not bool(over.all()))


def _read(decoder: Any, ids: Tensor, states: Any, cache: Any) -> tuple[Tensor, Any]:
    """Return the decoder's last hidden state ``[R, C]`` and its cache."""
    out = decoder(input_ids=ids, encoder_hidden_states=states, past_key_values=cache, use_cache=True)
    return out.last_hidden_state[:, -1], returned_cache(out)


def _opening(settings: Any, logits: Tensor) -> list[Tensor]:
    """Return the tokens after the start, each ``[R]``: language, task, no time stamps; those that there are.

    Args:
        settings: The generation config.
        logits: ``[R, V]`` after the start token.
    """
    opening = []
    languages = sorted((getattr(settings, "lang_to_id", None) or {}).values())
    if languages:
        known = torch.tensor(languages, device=logits.device)
        opening.append(known[logits[:, known].argmax(-1)])
    task = (getattr(settings, "task_to_id", None) or {}).get("transcribe") if languages else None
    for token in (task, getattr(settings, "no_timestamps_token_id", None)):
        if token is not None:
            opening.append(torch.full_like(logits[:, 0], token, dtype=torch.int64))
    return opening


def _ids(value: Any, device: torch.device) -> Tensor:
    listed = [] if value is None else [value] if isinstance(value, int) else list(value)
    return torch.tensor(listed, dtype=torch.int64, device=device)
