"""Columns and text tokens that the latest prefill kept, which `Compression.selections` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvprune.errors import CompressionStateError
from kvprune.tokens.replacement import Replacement
from kvprune.tokens.selection import Selection

__all__ = ["KeptSelections"]


@dataclass(frozen=True)
class _Layer:
    """Columns that a layer attended to in prefill and kept, for R rows of ``copies`` copies each."""

    attended: Selection | None
    kept: Selection
    copies: int


@dataclass(frozen=True)
class KeptSelections:
    """Columns and text tokens that each layer kept, for each row of the batch."""

    _layers: dict[int, _Layer] = field(default_factory=dict)
    _text: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    _replaced: dict[int, tuple[Replacement | None, int]] = field(default_factory=dict)

    def add(self, layer_idx: int, attended: Selection | None, kept: Selection, copies: int) -> None:
        """Store the columns that a cross-attention layer attended to and kept.

        Args:
            layer_idx: Index of the decoder layer.
            attended: Columns that its prefill attended to, for R rows; None for all columns.
            kept: Columns that decoding uses, for R rows.
            copies: Consecutive rows of the batch that each of the R rows represents.
        """
        self._layers[layer_idx] = _Layer(attended, kept, copies)
        self._replaced.pop(layer_idx, None)

    def add_replaced(self, layer_idx: int, replaced: Replacement, copies: int) -> None:
        """Store the new tokens that a cross-attention layer received in its prefill.

        Args:
            layer_idx: Index of the decoder layer.
            replaced: In the places of the columns that it attended to, or of more of them, for R rows.
            copies: Consecutive rows of the batch that each of the R rows represents.
        """
        self._replaced[layer_idx] = replaced, copies

    @property
    def replaced_layers(self) -> Mapping[int, int]:
        """Layers that received new tokens, by index, and the copies of each row."""
        return {layer_idx: copies for layer_idx, (_, copies) in self._replaced.items()}

    def note_replaced(self, layer_idx: int, copies: int) -> None:
        """Note that a layer received new tokens, whose features are unknown."""
        self._replaced[layer_idx] = None, copies

    def forget_features(self) -> None:
        """Forget the features of new tokens, but not that there were some."""
        for layer_idx, (_, copies) in self._replaced.items():
            self._replaced[layer_idx] = None, copies

    def add_text(self, layer_idx: int, tokens: Tensor | None, seen: int) -> None:
        """Store the tokens that a self-attention layer kept.

        Args:
            layer_idx: Index of the decoder layer.
            tokens: int64 ``[B, H or 1, K]``, the token of each entry; None if all are held.
            seen: Number of tokens before pruning.
        """
        self._text.pop(layer_idx, None)
        if tokens is not None:
            self._text[layer_idx] = tokens, seen

    def as_rows(self) -> Mapping[int, tuple[Selection | None, Selection, int]]:
        """Return what each layer attended to and kept, for R rows, and the copies of each row."""
        return {index: (layer.attended, layer.kept, layer.copies) for index, layer in self._layers.items()}

    @property
    def text_tokens(self) -> Mapping[int, tuple[Tensor, int]]:
        """Tokens that pruned self-attention layers hold, int64 ``[B, H or 1, K]``, and how many they saw."""
        return dict(self._text)

    @property
    def selections(self) -> Mapping[int, Selection]:
        """Columns that decoding uses since the latest prefill, by layer index."""
        return {layer_idx: layer.kept.repeat(layer.copies) for layer_idx, layer in self._layers.items()}

    @property
    def prefill_selections(self) -> Mapping[int, Selection | None]:
        """Columns that the latest prefill attended to, by layer index; None for all columns."""
        return {
            layer_idx: None if layer.attended is None else layer.attended.repeat(layer.copies)
            for layer_idx, layer in self._layers.items()
        }

    @property
    def replacements(self) -> Mapping[int, Replacement]:
        """New tokens that the latest prefill fed to its layers, by layer index; others are left out.

        Raises:
            CompressionStateError: If they were not recorded.
        """
        found = {}
        for layer_idx, (replaced, copies) in self._replaced.items():
            if replaced is None:
                raise CompressionStateError(
                    f"the policy put new tokens in the place of columns at layer {layer_idx}, but their "
                    "features were not recorded; call run.record_replacements() before the model runs"
                )
            found[layer_idx] = replaced.repeat(copies)
        return found

    @property
    def text_selections(self) -> Mapping[int, Selection]:
        """Text tokens that the latest prefill kept, by layer index; layers that keep all are left out."""
        found = {}
        for layer_idx, (tokens, seen) in self._text.items():
            mask = torch.zeros(*tokens.shape[:2], seen, dtype=torch.bool, device=tokens.device)
            found[layer_idx] = Selection.from_mask(mask.scatter_(-1, tokens, True))  # [B, H or 1, seen]
        return found
