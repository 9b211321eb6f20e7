"""What is known while one prefill runs: who sees what, what was decided, what is still to be decided."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvprune.cache.copies import Twins
from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.engine.guidance import Prompt
from kvprune.engine.measurement import PrefillRecord, Stopwatch
from kvprune.policy.text_view import TextView
from kvprune.policy.view import LayerView
from kvprune.tokens.layout import Layout
from kvprune.tokens.selection import Selection
from kvprune.tokens.visibility import Visibility

__all__ = ["Asked", "Observed", "Prefill"]


@dataclass
class Prefill:
    """Dropped when the forward call ends."""

    visibility: Visibility
    first_new: int
    fingerprints: Callable[[], Tensor]
    twins: Twins
    cached: bool
    record: PrefillRecord
    layout: Callable[[], Layout] | None = None
    prompt: Callable[[Tensor], Prompt] | None = None
    guidance: Tensor | None = None
    class_attention: Callable[[], Tensor] | None = None
    onward: Selection | None = None
    prepared: bool = False
    observed: list[Observed] = field(default_factory=list)
    text: TextView | None = None  # of the latest self-attention, if the policy needs it
    text_counts: Tensor | None = None

    @functools.cached_property
    def image_tokens(self) -> Tensor:
        """Tokens of the images that arrive which decoding can see, int64 ``[R]``."""
        return self.arriving(None).decode.sum(-1)

    @property
    def new_columns(self) -> int:
        """Number of columns that arrive in this call."""
        return self.visibility.columns - self.first_new

    def arriving(self, received: Selection | None) -> Visibility:
        """Visibility of the columns that arrive at a layer: all new ones, or the survivors among them."""
        new = self.visibility.from_column(self.first_new)
        return new if received is None else new.at(received.indices[:, 0], received.valid[:, 0])

    def layout_of(self, received: Selection | None) -> Callable[[], Layout] | None:
        """Where these columns lie, computed if a policy asks."""
        layout = self.layout
        if layout is None or received is None:
            return layout
        return lambda: layout().at(received.indices[:, 0], received.valid[:, 0])

    def guidance_of(self, received: Selection | None) -> Tensor | None:
        """What the guide says about these columns; None if the policy did not ask."""
        if self.guidance is None or received is None:
            return self.guidance
        return self.guidance.gather(-1, received.indices[:, 0])

    def class_attention_of(self, received: Selection | None, device: torch.device) -> Tensor | None:
        """What class tokens pay to these columns, if the policy needs it."""
        if self.class_attention is None:
            return None
        paid = self.class_attention()
        if received is not None:
            index = received.indices[:, 0].to(paid.device)
            paid = paid.gather(-1, index).masked_fill(~received.valid[:, 0].to(paid.device), 0)
        return paid.to(device)


@dataclass(frozen=True)
class Asked:
    """A layer about which a decision is due: what the policy saw, and where to apply its answer."""

    view: LayerView
    layer: CrossKVLayer
    first: int
    attended: Selection | None


@dataclass(frozen=True)
class Observed:
    """A layer that a policy has observed and about which it decides later."""

    asked: Asked
    statistics: Any
    watch: Stopwatch
