"""State of one prefill: who sees which columns, what was captured, what was decided, what is still to decide.

Discarded when the forward call ends.
"""

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
from kvprune.policy.captured import Captured
from kvprune.policy.view import LayerView
from kvprune.tokens.layout import Layout
from kvprune.tokens.selection import Selection
from kvprune.tokens.visibility import Visibility

__all__ = ["Asked", "Observed", "Prefill"]


@dataclass
class Prefill:
    """What the manager knows while one forward call brings encoder states.

    Axes: R rows of the batch that differ, S columns.

    Args:
        visibility: Of all columns, those of earlier images included.
        first_new: The first column that arrives in this call.
        fingerprints: Returns the seeds of random policies, int64 ``[R]``.
        twins: How many consecutive rows of the batch are copies of one.
        cached: Whether there is a cache.
        record: Measures this prefill.
        layout: Returns where the new columns lie in their images; None if that is not known.
        prompt: Returns what a guide needs to repeat this call, given the features of the new columns.
        capture: Returns what was captured of all new columns by the time the first layer runs.

    Attributes:
        captured: What `capture` and the guide returned, and the text before the layer that runs.
        onward: The columns that later layers receive; None for all new ones.
        is_prepared: Whether everything that comes before the first layer is done.
        observed: Layers about which a policy decides when all have attended.
        text_counts: How many text entries of each sample are kept, int64 ``[R]``.
    """

    visibility: Visibility
    first_new: int
    fingerprints: Callable[[], Tensor]
    twins: Twins
    cached: bool
    record: PrefillRecord
    layout: Callable[[], Layout] | None = None
    prompt: Callable[[Tensor], Prompt] | None = None
    capture: Callable[[], Captured] | None = None
    captured: Captured = Captured()
    onward: Selection | None = None
    is_prepared: bool = False
    observed: list[Observed] = field(default_factory=list)
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

    def captured_of(
        self, received: Selection | None, own: Captured, device: torch.device, *, follows_text: bool
    ) -> Captured:
        """Join what one layer captured with what was captured of the whole prefill.

        Args:
            received: The columns that arrived at the layer.
            own: What was captured in the layer itself, for these columns and R rows.
            device: Where the layer's keys are.
            follows_text: Whether a self-attention of the text comes before the layer.
        """
        shared = self.captured.at(received)
        return own.joined(shared if follows_text else shared.without("text"), device)


@dataclass(frozen=True)
class Asked:
    """A layer about which a decision is due.

    Args:
        view: What the policy saw.
        layer: The cache layer to which its answer applies.
        first: The first entry of the layer that is new; earlier ones belong to earlier images.
        attended: What the layer attended to; None for all columns.
    """

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
