"""What a policy that decides in decode steps knows about one layer; the cache layer owns it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kvprune.errors import UnsupportedCacheError
from kvprune.tokens.packing import repeat_rows

__all__ = ["StepMemory"]


class StepMemory:
    """State of a policy between decode steps.

    While no step changes it, the state has a row for each held row, which copies of a sample share. A policy
    that observes steps has a row for each row of the batch, because beams differ.

    Args:
        tensors: The state, ``[R, ...]`` by name.
        device: Device of the layer.
        copies: Rows of the batch for each held row.
        by_row: Whether each row of the batch has a state of its own.
        compiles: Whether the policy's steps can be traced into one graph.

    Attributes:
        in_graphs: int64 ``[]``, compiled decode steps so far; a graph counts them.
        taken_eagerly: All others.
        is_changed: Whether a step has changed the state.
        taken_back: Steps that were taken back, as far as the host knows.
        text_before: Text tokens in the cache before the first step; None until then, and where unknown.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        device: torch.device,
        *,
        copies: int = 1,
        by_row: bool = False,
        compiles: bool = False,
    ) -> None:
        self.by_row, self.compiles, self.is_changed = by_row, compiles, False
        self.tensors = {
            name: repeat_rows(tensor, copies).clone() if by_row and copies > 1 else tensor
            for name, tensor in tensors.items()
        }
        self.in_graphs = torch.zeros((), dtype=torch.int64, device=device)
        self.taken_eagerly = self.taken_back = 0
        self.text_before: int | None = None

    @property
    def taken(self) -> Tensor:
        """Decode steps so far, int64 ``[]``."""
        return self.in_graphs + self.taken_eagerly

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def of_text_rows(self, copies: int, rows: int) -> dict[str, Tensor]:
        """Return the state of each text row, ``[N, ...]``.

        Args:
            copies: Rows of the batch for each held row.
            rows: Text rows of the step for each row of the batch.
        """
        times = rows if self.by_row else copies * rows
        return {name: repeat_rows(tensor, times) for name, tensor in self.tensors.items()}

    def advance(self, rows: int) -> None:
        """Count a step of that many text rows."""
        # A graph reads the number at the same address in each step; other policies read that of the host.
        if self.compiles and torch.compiler.is_compiling():
            self.in_graphs.add_(rows)
        else:
            self.taken_eagerly += rows

    def store(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the state by that after a step, ``[B, ...]`` under the same names."""
        self.is_changed = True
        for name, tensor in tensors.items():
            old = self.tensors[name]
            if torch.compiler.is_compiling() and old.shape == tensor.shape and old.dtype == tensor.dtype:
                old.copy_(tensor)
            else:
                self.tensors[name] = tensor

    def over_rows(self, move: Callable[[Tensor], Tensor]) -> None:
        """Apply an operation on rows, or on the device, to each tensor of the state."""
        self.tensors = {name: move(tensor) for name, tensor in self.tensors.items()}

    def select(self, rows: Tensor) -> None:
        """Keep the state of some rows, int64."""
        self.over_rows(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def repeat(self, repeats: int) -> None:
        """Repeat each row."""
        self.over_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def follow_text(self, before: int) -> None:
        """Take back the steps of text tokens that have left the cache since.

        transformers takes rejected drafts from the text alone if it keeps text and encoder tokens apart.

        Args:
            before: Text tokens in the cache before this step.

        Raises:
            UnsupportedCacheError: As `take_back` says.
        """
        if not self.taken_eagerly:
            self.text_before = before
        elif self.text_before is not None:
            rejected = self.text_before + self.taken_eagerly - before
            if rejected > 0:
                self.take_back(rejected)

    def take_back(self, tokens: int) -> None:
        """Take back the last steps, as assisted decoding does with rejected drafts.

        Raises:
            UnsupportedCacheError: If the steps have changed the state.
        """
        if self.is_changed and tokens:
            raise UnsupportedCacheError(
                f"{tokens} tokens are taken back from the cache, but the policy has observed their steps and "
                "cannot forget them; decode without an assistant, or with a policy that observes no steps"
            )
        undone = min(tokens, self.taken_eagerly)
        self.taken_eagerly -= undone
        self.taken_back += undone
        if tokens > undone:
            self.in_graphs = (self.in_graphs - (tokens - undone)).clamp(min=0)  # the prompt's are no steps

    def to(self, device: torch.device | str) -> None:
        """Move to a device."""
        self.over_rows(lambda tensor: tensor.to(device))
        self.in_graphs = self.in_graphs.to(device)
