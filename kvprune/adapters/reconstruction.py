"""What an adapter does so that a model reconstructs what its encoder has read.

`kvprune.session.reconstruction` asks for a `Context`, lets the model write if there is no text yet, and runs
it once more over both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvprune.engine.guidance import Prompt
from kvprune.errors import GuideError, UnsupportedModelError
from kvprune.policy.reconstruction import Reconstruction

__all__ = ["Context", "Reconstructing", "Writing", "require_generating", "start_of", "text_first"]


@dataclass(frozen=True, eq=False)
class Context:
    """A prompt that does not depend on the target's, and the text of the encoder's input if it is known.

    Args:
        prompt: What the decoder reads first.
        text: int64 ``[R, n]``, token ids of what the encoder has read; None if the model must write a text.
        real: bool ``[R, n]``, which of them are no padding; they come first.
        note: What a user should know about it, or "".
    """

    prompt: Prompt
    text: Tensor | None = None
    real: Tensor | None = None
    note: str = ""


@dataclass(frozen=True, eq=False)
class Writing:
    """A text that a model wrote.

    Args:
        text: int64 ``[R, n]``.
        written: bool ``[R, n]``, true up to the first end of sequence.
        calls: Forward calls that it took.
        is_cut: Whether some text may have been cut at the largest number of tokens.
    """

    text: Tensor
    written: Tensor
    calls: int
    is_cut: bool


class Reconstructing:
    """The part of an adapter that reconstructs; a family that provides "reconstruction" defines it."""

    family: ClassVar[str]
    model: Any

    def require_reconstruction(self) -> None:
        """Raise unless this model can reconstruct what its encoder reads; nothing has run by then.

        Raises:
            UnsupportedModelError: Names the family and the reason.
        """
        raise UnsupportedModelError(f"the adapter for {self.family} does not define how to reconstruct")

    def context(self, prompt: Prompt, request: Reconstruction) -> Context:
        """Return what the decoder reads first, and the text of what the encoder has read if it is known.

        Args:
            prompt: Inputs of the target's forward call. Only what the encoder has read is taken from it.
            request: The prompt of the reconstruction.

        Raises:
            GuideError: If there is no text, or the encoder's input is not known.
        """
        raise GuideError(f"the adapter for {self.family} does not define context()")

    def write(self, prompt: Prompt, max_new_tokens: int) -> Writing:
        """Write a text of what the encoder has read, greedily.

        Args:
            prompt: As `context` returned it.
            max_new_tokens: Most tokens.

        Raises:
            GuideError: If the model cannot.
        """
        raise GuideError(f"the adapter for {self.family} does not define write()")


def require_generating(model: Any, family: str) -> None:
    """Raise unless a model can generate.

    Raises:
        UnsupportedModelError: Names the class.
    """
    if not getattr(model, "can_generate", lambda: False)():
        raise UnsupportedModelError(
            f"{type(model).__name__} ({family}) cannot generate, so it cannot write what its encoder reads; "
            "pass the model with its language head"
        )


def start_of(model: Any, family: str) -> int:
    """Return the id with which the decoder of an encoder-decoder model starts.

    Raises:
        GuideError: If the configs name none.
    """
    for config in (getattr(model, "generation_config", None), model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            found = getattr(config, name, None)
            if isinstance(found, int):
                return found
    raise GuideError(
        f"the config of this {family} names no decoder_start_token_id, so its decoder cannot start a "
        "reconstruction; set model.generation_config.decoder_start_token_id"
    )


def text_first(ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return token ids with the padding last, and which are no padding, both ``[R, n]``.

    Args:
        ids: int64 ``[R, n]``.
        mask: ``[R, n]``, 0 at padding; None for no padding.
    """
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    order = (~real).long().argsort(dim=-1, stable=True)
    ids, real = ids.gather(-1, order), real.gather(-1, order)
    return ids.masked_fill(~real, 0), real
