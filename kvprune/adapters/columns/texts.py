"""The text that an encoder of text has read, which its decoder can repeat."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvprune.adapters.arguments import named_arguments
from kvprune.adapters.columns.layouts import Columns, EncoderNotes
from kvprune.adapters.reconstruction import Context, start_of, text_first
from kvprune.engine.guidance import Prompt
from kvprune.errors import GuideError
from kvprune.policy.reconstruction import Reconstruction

__all__ = ["Texts"]


class Texts(Columns):
    """The part of an encoder-decoder adapter that remembers the token ids that its encoder was given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.texts = EncoderNotes()

    def watch_text(self) -> None:
        """Note the token ids of each call of the encoder from now on."""
        if self.encoder is not None:
            self.after(self.encoder, self._note_text, watches=True)

    def detach(self) -> None:
        """Undo `attach`, and forget the texts."""
        super().detach()
        self.texts.clear()

    def _note_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        named = named_arguments(module, args, kwargs)
        ids, mask = named.get("input_ids"), named.get("attention_mask")
        if isinstance(ids, Tensor) and ids.ndim == 2 and isinstance(output[0], Tensor):
            self.texts.add(output[0], (ids, mask if isinstance(mask, Tensor) and mask.ndim == 2 else None))

    def require_reconstruction(self) -> None:
        """Do nothing: the encoder's own tokens are the text."""

    def context(self, prompt: Prompt, request: Reconstruction) -> Context:
        """Return the start of the decoder and the encoder's own tokens."""
        states = prompt.states
        noted = None if states is None else self.texts.of(states)
        if states is None or noted is None:
            raise GuideError(
                f"{self.family} repeats the text that its encoder has read, but the encoder got no input_ids "
                "inside the block; pass input_ids, not encoder_outputs or inputs_embeds"
            )
        (ids, mask), times = noted
        if ids.shape[1] != states.shape[1]:
            raise GuideError(
                f"the encoder of {self.family} read {ids.shape[1]} tokens and returned {states.shape[1]} "
                "columns, so it is not known which text they stand for"
            )
        text, real = text_first(ids.to(states.device), None if mask is None else mask.to(states.device))
        text, real = text.repeat_interleave(times, 0), real.repeat_interleave(times, 0)
        return Context(self.started(prompt, request), text, real)

    def started(self, prompt: Prompt, request: Reconstruction) -> Prompt:
        """Return the prompt of a reconstruction: the decoder's start, then the ids that were asked for."""
        assert prompt.states is not None
        ids = torch.tensor([[start_of(self.model, self.family), *request.prompt_ids]])
        ids = ids.to(prompt.states.device).expand(len(prompt.states), -1)  # [R, T]
        arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "encoder_attention_mask" in prompt.arguments:
            arguments["encoder_attention_mask"] = prompt.arguments["encoder_attention_mask"]
        return Prompt(arguments, prompt.states)
