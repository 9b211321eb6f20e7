"""What a model predicts for the tokens of an answer, in one forward call that has read prompt and answer."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from kvprune.adapters.base import ModelAdapter
from kvprune.adapters.encoder_decoder import EncoderDecoderAdapter
from kvprune.adapters.prompts import with_answer
from kvprune.engine.guidance import Prompt
from kvprune.errors import TrainingError

__all__ = ["predictions"]

_TAKEN = ("decoder_input_ids", "encoder_outputs")
"""Arguments of an encoder-decoder model that are passed."""

_NOT_PASSED = ("past_key_values", "cache_position", "inputs_embeds", "position_ids", "encoder_attention_mask")
"""Arguments of a decoder that follow from others, or that only the prompt knows."""


def predictions(adapter: ModelAdapter, prompt: Prompt, answer: Tensor, written: Tensor) -> Tensor:
    """Return the logits of the rows that predict an answer, ``[R, n, V]``.

    The model runs as its adapter has hooked it, and may carry a gradient.

    Args:
        adapter: Of the model.
        prompt: Prompts with the features of the encoder.
        answer: int64 ``[R, n]``, tokens after the prompt; the last one is only predicted, not read.
        written: bool ``[R, n]``, which of them belong to the answer; the rest is padding.

    Raises:
        TrainingError: If the model predicts nothing.
        KVPruneError: Whatever the adapter raises.
    """
    if isinstance(adapter, EncoderDecoderAdapter):
        return _by_the_head(adapter, prompt, answer, written)
    logits = adapter.replay(prompt, answer, written)
    if logits is None:
        raise TrainingError(
            f"the adapter for {adapter.family} does not return what the model predicts for an answer, so "
            "nothing can be distilled; train on a Whisper or a Llama-3.2-Vision"
        )
    return logits


def _by_the_head(adapter: EncoderDecoderAdapter, prompt: Prompt, answer: Tensor, written: Tensor) -> Tensor:
    """Run the whole model but its encoder, so that the logits are those of its own head.

    Heads differ: BART adds a bias, T5 scales, T5Gemma caps. What the decoder reads is exchanged for what it
    read in the prompt's call, because the arguments of the outer model may mean something else: the mask of
    a speech model counts samples, and that of its decoder counts columns.
    """
    model: Any = adapter.model
    decoder: Any = adapter.decoder
    takes = inspect.signature(model.forward).parameters
    tokens = prompt.arguments.get("input_ids")
    if any(name not in takes for name in _TAKEN) or (tokens is not None and tokens.ndim != 2):
        raise _without_head(model)
    from transformers.modeling_outputs import BaseModelOutput  # slow to import

    assert prompt.states is not None
    encoded: Any = BaseModelOutput(last_hidden_state=prompt.states)
    encoded.attention_mask = encoded.router_logits = None  # some models ask for them
    arguments: dict[str, Any] = {**prompt.arguments, "encoder_hidden_states": prompt.states}
    arguments |= {**with_answer(prompt, answer, written, decoder.config), "use_cache": False}

    def exchanged(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        kept = {name: value for name, value in kwargs.items() if name not in _NOT_PASSED}
        return (), {**kept, **arguments}

    handle = decoder.register_forward_pre_hook(exchanged, with_kwargs=True, prepend=True)
    try:
        out = model(decoder_input_ids=arguments["input_ids"], encoder_outputs=encoded, use_cache=False)
    finally:
        handle.remove()
    logits: Tensor | None = getattr(out, "logits", None)
    if logits is None or logits.shape[:2] != arguments["input_ids"].shape:
        raise _without_head(model)
    return logits[:, -answer.shape[1] :]


def _without_head(model: Any) -> TrainingError:
    return TrainingError(
        f"a {type(model).__name__} does not predict one token after each token from encoder states, so "
        "nothing can be distilled; train on the model with its language head, such as "
        "WhisperForConditionalGeneration"
    )
