"""Where a model attends to encoder states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Site"]


@dataclass(frozen=True)
class Site:
    """One cross-attention module of a model.

    Attributes:
        layer_idx: Index of the decoder layer.
        module: The cross-attention module.
        states: Name of its argument for encoder states.
        mask: Name of its argument for the attention mask.
    """

    layer_idx: int
    module: Any
    states: str
    mask: str
