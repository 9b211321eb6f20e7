"""Makes prompts for a guide from calls of an Mllama, and runs an Mllama as a guide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kvprune.adapters.arguments import cache_argument, cache_of
from kvprune.adapters.prompts import copied_cache, distinct_rows, padding_mask, with_answer
from kvprune.engine.guidance import Prompt
from kvprune.errors import GuideError

__all__ = ["answer", "geometry", "make_prompt", "replay"]

_TEXT = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cross_attention_mask")
_IMAGE = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


def make_prompt(named: Mapping[str, Any], batch: int, length: int, copies: int) -> Callable[[Tensor], Prompt]:
    """Return a function that makes a guide's prompt from a forward call, given the features of new columns.

    Args:
        named: Arguments of the forward call by name.
        batch: Rows B of the call.
        length: Text rows T of the call.
        copies: Consecutive rows of the batch that are equal.

    Raises:
        GuideError: If there is a cache of earlier turns that cannot be copied.
    """
    # Copied now: when the guide runs, the first layers have already added this turn's text to the cache.
    past = copied_cache(cache_of(named), batch, copies)
    attended = named.get("attention_mask")
    given = {**named, "attention_mask": attended if past is not None else padding_mask(attended, length)}
    arguments = {}
    for name in (*_TEXT, *_IMAGE):
        value = given.get(name)
        if isinstance(value, Tensor):
            arguments[name] = distinct_rows(value, copies)
    return lambda features: Prompt(arguments, features, past)


def geometry(inner: Any) -> Mapping[str, object]:
    """Return tiles, patches and vocabulary size, which a guide must share with its target."""
    vision = inner.vision_model
    return {
        "image size": vision.image_size,
        "patch size": vision.patch_size,
        "tiles per image": vision.max_num_tiles,
        "columns per tile": vision.num_patches,
        "tile arrangements": [list(pair) for pair in vision.config.supported_aspect_ratios],
        "vocabulary": inner.language_model.config.vocab_size,
    }


def replay(
    model: Any, inner: Any, prompt: Prompt, answer: Tensor | None = None, written: Tensor | None = None
) -> Tensor | None:
    """Run a model on a prompt and an answer; see `ModelAdapter.replay`.

    Args:
        model: The model, with its language head if it has one.
        inner: The ``MllamaModel`` in it.
        prompt: Inputs of the target's forward call.
        answer: int64 ``[R, n]``, tokens after the prompt.
        written: bool ``[R, n]``, which of them belong to the answer.
    """
    arguments: dict[str, Any] = dict(prompt.arguments)
    if prompt.states is not None:  # the vision tower has run
        arguments = {name: value for name, value in arguments.items() if name != "pixel_values"}
        arguments["cross_attention_states"] = prompt.states
    else:
        _require_pixels(prompt)
    arguments |= {**cache_argument(inner, prompt.past), "use_cache": prompt.past is not None}
    if answer is None or written is None:
        inner(**arguments)
        return None
    length, more = prompt.text.shape[1], answer.shape[1] - 1
    arguments |= with_answer(prompt, answer, written, inner.language_model.config)
    rows = torch.arange(length - 1, length + more, device=answer.device)
    logits: Tensor = model(**arguments, logits_to_keep=rows).logits
    return logits


def answer(model: Any, prompt: Prompt, max_new_tokens: int) -> tuple[Tensor, Tensor]:
    """Generate an answer greedily; see `ModelAdapter.answer`.

    The vision tower runs again, because ``generate`` takes no encoder states.
    """
    _require_pixels(prompt)
    if prompt.past is not None or "input_ids" not in prompt.arguments:
        raise GuideError(
            "a guide can generate only from the token ids of a whole conversation, got "
            f"{'a later turn' if prompt.past is not None else 'inputs_embeds'}; use max_new_tokens=0"
        )
    generator = model
    if not getattr(generator, "can_generate", lambda: False)():
        raise GuideError(
            f"{type(generator).__name__} cannot generate, but the guide's max_new_tokens is "
            f"{max_new_tokens}; use 0, or pass the model with its language head"
        )
    arguments = {name: tensor for name, tensor in prompt.arguments.items() if name != "position_ids"}
    arguments.setdefault("attention_mask", torch.ones_like(prompt.text))
    plain = dict.fromkeys(("temperature", "top_p", "top_k"))  # unset, or generate warns
    out = generator.generate(
        **arguments,
        **plain,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        return_dict_in_generate=False,
    )
    new = out[:, prompt.text.shape[1] :]
    ends = generator.generation_config.eos_token_id
    ends = torch.tensor([ends] if isinstance(ends, int) else list(ends or []), device=new.device)
    over = torch.isin(new, ends).cumsum(-1)  # [R, n], ends up to and including each token
    return new, (over - torch.isin(new, ends).to(over.dtype)) == 0


def _require_pixels(prompt: Prompt) -> None:
    if "pixel_values" not in prompt.arguments:
        raise GuideError(
            "a guide reads pixel_values, but the model was called with cross_attention_states, which only "
            "its own vision tower can produce; pass pixel_values and aspect_ratio_ids"
        )
