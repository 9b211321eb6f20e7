"""Which columns and text tokens the latest prefill left, for `Compression.selections` and its siblings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvprune.tokens.selection import Selection

__all__ = ["KeptSelections"]


@dataclass(frozen=True)
class _Layer:
    """What a layer attended to in prefill, and what it kept; for R rows that stand for ``copies`` each."""

    attended: Selection | None
    kept: Selection
    copies: int


@dataclass(frozen=True)
class KeptSelections:
    """What each layer kept, with a row for each row of the batch."""

    _layers: dict[int, _Layer] = field(default_factory=dict)
    _text: dict[int, tuple[Tensor, int]] = field(default_factory=dict)

    def add(self, layer_idx: int, attended: Selection | None, kept: Selection, copies: int) -> None:
        """Note what a cross-attention layer attended to and kept.

        Args:
            layer_idx: Of the layer.
            attended: Columns that its prefill attended to, for R rows; None for all there were.
            kept: Columns that decoding uses, for R rows.
            copies: Rows of the batch for which each of these rows stands.
        """
        self._layers[layer_idx] = _Layer(attended, kept, copies)

    def add_text(self, layer_idx: int, tokens: Tensor | None, seen: int) -> None:
        """Note what a self-attention layer kept.

        Args:
            layer_idx: Of the layer.
            tokens: int64 ``[B, H or 1, K]``, the token of each entry; None if all are held.
            seen: Tokens that there were.
        """
        self._text.pop(layer_idx, None)
        if tokens is not None:
            self._text[layer_idx] = tokens, seen

    @property
    def selections(self) -> Mapping[int, Selection]:
        """Columns that decoding uses since the latest prefill, by layer index."""
        return {layer_idx: layer.kept.repeat(layer.copies) for layer_idx, layer in self._layers.items()}

    @property
    def prefill_selections(self) -> Mapping[int, Selection | None]:
        """Columns that the latest prefill attended to, by layer index; None for all there were."""
        return {
            layer_idx: None if layer.attended is None else layer.attended.repeat(layer.copies)
            for layer_idx, layer in self._layers.items()
        }

    @property
    def text_selections(self) -> Mapping[int, Selection]:
        """Tokens of the text that the latest prefill kept, by layer index; without layers that keep all."""
        found = {}
        for layer_idx, (tokens, seen) in self._text.items():
            mask = torch.zeros(*tokens.shape[:2], seen, dtype=torch.bool, device=tokens.device)
            found[layer_idx] = Selection.from_mask(mask.scatter_(-1, tokens, True))
        return found
