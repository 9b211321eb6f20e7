"""Guidance for references that may look at the answer, made once a batch from the full cache's answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvprune.comparison.execution.quiet import without_warnings
from kvprune.engine.guidance import Guidance
from kvprune.session.answer_guide import answer_attention

__all__ = ["AnswerGuidance"]


@dataclass
class AnswerGuidance:
    """The full cache's answers to the latest batch, and the guidance that was made from them.

    Args:
        model: The model.
    """

    model: Any
    _inputs: Mapping[str, Any] | None = field(default=None, init=False, repr=False)
    _answer: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)
    _guidance: Guidance | None = field(default=None, init=False, repr=False)

    def knows(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the answers to these inputs, the same object, were noted last."""
        return self._inputs is inputs

    def note(self, inputs: Mapping[str, Any], new: Tensor, lengths: list[int], limit: int) -> None:
        """Note what the full cache answered.

        Args:
            inputs: What the model was given.
            new: New tokens, int64 ``[B, new]``.
            lengths: Length of each answer, without the token that ends it.
            limit: Limit on the length; a shorter answer was ended by the model.
        """
        self._inputs, self._guidance = inputs, None
        self._answer = with_ends(new, lengths, limit, self.model.generation_config.eos_token_id)

    def of(self, inputs: Mapping[str, Any]) -> Guidance:
        """Return the guidance for inputs whose answers were noted; see `answer_attention` for the errors."""
        assert self.knows(inputs)
        assert self._answer is not None
        if self._guidance is None:
            with torch.inference_mode(), without_warnings():
                self._guidance = answer_attention(self.model, inputs, *self._answer)
        return self._guidance


def with_ends(
    new: Tensor, lengths: list[int], limit: int, ends: int | list[int] | None
) -> tuple[Tensor, Tensor]:
    """Return answers with the tokens that end them, and which tokens belong to each, both ``[B, new + 1]``.

    Whisper's ``generate`` cuts off the token that ends an answer.

    Args:
        new: New tokens, int64 ``[B, new]``.
        lengths: Length of each answer, without the token that ends it.
        limit: Limit on the length; a shorter answer was ended by the model.
        ends: Tokens that end answers.
    """
    known = [ends] if isinstance(ends, int) else list(ends or [])
    places, count = torch.arange(new.shape[1] + 1), torch.tensor(lengths)[:, None]
    places, count = places.to(new.device), count.to(new.device)  # [new + 1], [B, 1]
    written = places < count + (count < limit).long()  # [B, new + 1]
    if not known:
        return new, written[:, : new.shape[1]]
    answer = torch.cat([new, new.new_full((len(new), 1), known[0])], dim=1)
    is_end = torch.isin(answer, torch.tensor(known, device=new.device))
    return torch.where((places == count) & ~is_end, known[0], answer), written
