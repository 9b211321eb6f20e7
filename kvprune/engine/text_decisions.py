"""Decisions about the text cache of self-attention layers, from the policy's answer to the pruned layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from kvprune.cache.text_layer import TextKVLayer
from kvprune.engine.kept import KeptSelections
from kvprune.engine.measurement import PrefillRecord, Stopwatch
from kvprune.policy.text_view import TextView
from kvprune.tokens.selection import Selection

__all__ = ["TextDecision"]


@dataclass(frozen=True)
class TextDecision:
    """What a policy keeps of the text in one self-attention layer.

    Args:
        layer_idx: Index of the decoder layer.
        layer: Its cache layer, which still holds all entries.
        selection: The entries to keep, for each row of the batch; None for all.
        fraction: float ``[R]``, entries kept / entries before pruning.
        watch: Around the decision.
    """

    layer_idx: int
    layer: TextKVLayer
    selection: Selection | None
    fraction: Tensor
    watch: Stopwatch

    @classmethod
    def of(
        cls,
        view: TextView,
        layer: TextKVLayer,
        selection: Selection | None,
        counts: Tensor | None,
        copies: int,
        watch: Stopwatch,
    ) -> Self:
        """Return the decision that a policy's answer stands for.

        Args:
            view: What the policy saw, of R rows.
            layer: The cache layer.
            selection: The answer, checked; None to keep all.
            counts: int64 ``[R]``, entries that it keeps.
            copies: Consecutive rows of the batch that each of the R rows represents.
            watch: Around the decision.
        """
        available = view.real.sum(-1).clamp(min=1)  # [R], text entries that are no padding
        fraction = torch.ones_like(available) if selection is None or counts is None else counts / available
        selection = None if selection is None else selection.repeat(copies)
        return cls(view.layer_idx, layer, selection, fraction, watch)

    def apply(self, kept: KeptSelections, record: PrefillRecord) -> None:
        """Drop what is not kept, and write down what the layer holds now."""
        layer = self.layer
        if self.selection is not None:
            layer.retain(self.selection)
        kept.add_text(self.layer_idx, None if layer.slots is None else layer.tokens(), layer.seen)
        record.note_text_decision(self.layer_idx, layer, self.watch, self.fraction)
