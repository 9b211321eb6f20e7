"""Lessons: prompts of a model with answers to them, from which a policy learns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from kvprune.adapters.base import ModelAdapter
from kvprune.engine.guidance import Guidance, Prompt
from kvprune.engine.manager import CrossKVManager
from kvprune.errors import TrainingError
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.view import LayerView
from kvprune.tokens.decision import Decision

__all__ = ["Everything", "FullReading", "Lesson", "Lessons", "answer_tensors", "prompt_of"]


@dataclass(frozen=True)
class FullReading:
    """What a model makes of prompts with answers if it has all of its encoder tokens.

    Attributes:
        logits: ``[R, n, V]`` of the rows that predict the answers, up to a constant in each row.
        outputs: What each cross-attention returns for these rows, ``[R, n, C]``; empty if nobody asked.
    """

    logits: Tensor
    outputs: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Lesson:
    """A batch of prompts with answers.

    Axes: R prompts, n tokens of the longest answer.

    Attributes:
        prompt: The prompts, with the features of the encoder.
        answer: int64 ``[R, n]``, the tokens of the answers, the one that ends them included.
        written: bool ``[R, n]``, which of them belong to the answer; the rest is padding.
        full: What the model makes of them with all tokens, cross-attention outputs included; None if it was
            not kept, and is computed each time.
    """

    prompt: Prompt
    answer: Tensor
    written: Tensor
    full: FullReading | None = None


class Lessons(Protocol):
    """Where lessons come from. A lesson depends on its number alone, so that training can be resumed."""

    @property
    def source(self) -> str:
        """What the lessons are made of, for readers and to tell two trainings apart."""

    def lesson(self, number: int) -> Lesson:
        """Return a lesson to learn from, from 0 on; they never end."""

    def validation(self) -> Sequence[Lesson]:
        """Return the lessons that nobody learns from."""


def answer_tensors(answers: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return answers as tokens ``[R, n]`` and which of these are written, bool ``[R, n]``.

    Raises:
        TrainingError: If an answer has no token.
    """
    if not all(answers):
        raise TrainingError("an answer to learn from has no token")
    longest = max(map(len, answers))
    tokens = torch.zeros(len(answers), longest, dtype=torch.int64)
    written = torch.zeros(len(answers), longest, dtype=torch.bool)
    for row, answer in enumerate(answers):
        tokens[row, : len(answer)] = torch.tensor(answer)
        written[row, : len(answer)] = True
    return tokens.to(device), written.to(device)


@dataclass(frozen=True, kw_only=True)
class Everything(CrossKVPolicy):
    """Keeps all that there is, as the model would without kvprune."""

    name: ClassVar[str] = "everything"
    keeps_invisible: ClassVar[bool] = True

    def select(self, view: LayerView) -> Decision:
        """Keep everything."""
        return Decision()


@dataclass(frozen=True, kw_only=True)
class _Watching(Everything):
    """Keeps everything; it asks for guidance only to be shown the prompt."""

    name = "watching"
    needs = frozenset({"guidance"})


@contextmanager
def prompt_of(adapter: ModelAdapter) -> Iterator[list[Prompt]]:
    """Note the prompt of each prefill in a block, with the features of the encoder.

    Args:
        adapter: Of the model; not attached.

    Raises:
        TrainingError: If the family makes no prompts.
    """
    found: list[Prompt] = []

    def note(prompt: Prompt) -> Guidance:
        assert prompt.states is not None
        found.append(prompt)
        zeros: Any = prompt.states.new_zeros(prompt.states.shape[:2], dtype=torch.float32)
        return Guidance(scores=zeros, rows=zeros.new_zeros(len(zeros), dtype=torch.int64))

    if "guidance" not in adapter.provides:
        raise TrainingError(f"the adapter for {adapter.family} makes no prompts to learn from")
    adapter.attach(CrossKVManager(_Watching(), 0, adapter.layer_indices, note))
    try:
        yield found
    finally:
        adapter.detach()
