"""State of one prefill: visibility, captured tensors, decisions so far, and layers that await a decision.

`CrossKVManager.begin` makes a `Prefill`; each hook of the forward call reads and extends it, and
`CrossKVManager.end` discards it. Whatever must survive the call lives in the cache layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.cache.shared_rows import SharedRows
from kvprune.engine.guidance import Guidance, GuideReceipt, Prompt, to_rows
from kvprune.engine.kept import KeptSelections
from kvprune.engine.measurement import PrefillRecord, Stopwatch
from kvprune.policy.captured import Captured
from kvprune.policy.view import LayerView
from kvprune.tokens.layout import Layout
from kvprune.tokens.reindexing import compose
from kvprune.tokens.replacement import Replacement
from kvprune.tokens.selection import Selection
from kvprune.tokens.visibility import Visibility

__all__ = ["DecisionContext", "ObservedLayer", "Prefill"]


@dataclass
class Prefill:
    """State of the manager during one forward call that brings encoder states.

    Axes: R distinct rows of the batch, S columns.

    Args:
        visibility: Which text rows may attend which columns, those of earlier images included.
        first_new: The first column that arrives in this call.
        fingerprints: Returns int64 ``[R]``, digests of the inputs that seed random policies.
        shared_rows: Number of consecutive rows of the batch that are copies of one sample.
        cached: Whether there is a cache.
        record: Measurements of this prefill.
        layout: Returns the positions of the new columns in their images; None if unknown.
        prompt: Returns the input of a guide, given the features of the new columns.
        capture: Returns what the adapter captured of all new columns; called before the first layer.

    Attributes:
        captured: What `capture` and the guide returned, and the self-attention before the current layer.
        onward: The columns that later layers receive; None for all new ones.
        replaced: New tokens in the place of columns; later layers receive those that `onward` keeps. None if
            they receive the encoder's own.
        is_prepared: Whether the steps before the first layer are done.
        observed: Layers that a `PrefillPolicy` has observed and decides about at the end.
        text_counts: Number of text entries kept for each sample, int64 ``[R]``.
        kept: What each layer has attended to and kept.
        guide: Cost of the guide; None if there is none.
        reconstruction: ``[R, Hkv, S]`` of each layer, for policies that need it.
    """

    visibility: Visibility
    first_new: int
    fingerprints: Callable[[], Tensor]
    shared_rows: SharedRows
    cached: bool
    record: PrefillRecord
    layout: Callable[[], Layout] | None = None
    prompt: Callable[[Tensor], Prompt] | None = None
    capture: Callable[[], Captured] | None = None
    captured: Captured = Captured()
    onward: Selection | None = None
    replaced: Replacement | None = None
    is_prepared: bool = False
    observed: list[ObservedLayer] = field(default_factory=list)
    text_counts: Tensor | None = None
    kept: KeptSelections = field(default_factory=KeptSelections)
    guide: GuideReceipt | None = None
    reconstruction: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        if self.layout is not None:
            self.layout = functools.cache(self.layout)  # views of all layers read it

    @functools.cached_property
    def image_tokens(self) -> Tensor:
        """Number of new image tokens that decoding can see, int64 ``[R]``."""
        return self.arriving(None).decode.sum(-1)

    @property
    def new_columns(self) -> int:
        """Number of columns that arrive in this call."""
        return self.visibility.columns - self.first_new

    def pass_on(self, onward: Selection | Replacement) -> None:
        """Let later layers receive only these of the columns that arrive, or new tokens in their place."""
        if isinstance(onward, Replacement):
            received = None if self.onward is None else self.onward.with_merge(None)
            self.onward = compose(received, onward.places)
            # A copy, so that the policy cannot change it later. It keeps a gradient.
            self.replaced = Replacement.trusted(onward.with_padding().features.clone(), self.onward)
        else:
            self.onward = compose(self.onward, onward)

    def arriving(self, received: Selection | None) -> Visibility:
        """Return the visibility of the columns that arrive at a layer: all new ones, or those kept so far."""
        new = self.visibility.from_column(self.first_new)
        return new if received is None else new.at(received.indices[:, 0], received.valid[:, 0])

    def take(self, guidance: Guidance, device: torch.device) -> None:
        """Note what a guide has found out about the new columns, and free the inputs that it was given."""
        rows, copies = self.visibility.batch, self.shared_rows.copies
        found = to_rows(guidance, rows, copies, self.new_columns)
        self.guide, self.reconstruction, self.prompt = guidance.receipt, found.layers, None
        if not self.reconstruction:
            self.captured = replace(self.captured, guidance=found.scores.to(device))

    def layout_of(self, received: Selection | None) -> Callable[[], Layout] | None:
        """Return what computes the positions of these columns, which few policies read; None if unknown."""
        layout = self.layout
        if layout is None or received is None:
            return layout
        return lambda: layout().at(received.indices[:, 0], received.valid[:, 0])

    def captured_of(
        self, rank: int, received: Selection | None, own: Captured, device: torch.device, follows_text: bool
    ) -> Captured:
        """Return what was captured in one layer together with what was captured once for the prefill.

        Args:
            rank: Index of the layer among the cross-attention layers.
            received: The columns that arrived at the layer.
            own: Captured in the layer itself, for these columns and R rows.
            device: Device of the layer's keys.
            follows_text: Whether a self-attention layer comes before this layer.
        """
        shared = self.captured
        if self.reconstruction:
            shared = replace(shared, reconstruction=self.reconstruction[rank])
        shared = shared.at(received)
        return own.joined(shared if follows_text else shared.without("text"), device)


@dataclass(frozen=True)
class DecisionContext:
    """What a decision about one layer is based on and applied to.

    Args:
        view: What the policy sees.
        layer: The cache layer that the decision prunes.
        first: The first new entry of the layer; entries before it belong to earlier images.
        attended: Columns that the layer attended to; None for all columns.
        replaced: New tokens that the layer received in the place of columns; None for the encoder's own.
        received: The new columns that the layer received; None for all of them.
    """

    view: LayerView
    layer: CrossKVLayer
    first: int
    attended: Selection | None
    replaced: Replacement | None
    received: Selection | None


@dataclass(frozen=True)
class ObservedLayer:
    """A layer that a `PrefillPolicy` has observed, and decides about at the end.

    Args:
        context: The layer and its view, without captured tensors.
        statistics: What `PrefillPolicy.observe` returned.
        watch: Around that call.
    """

    context: DecisionContext
    statistics: Any
    watch: Stopwatch
