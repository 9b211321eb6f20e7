"""The cross-attention cache manager: asks the policy, checks the answer, applies it to the cache layers.

It knows tensors, selections and visibility, and no model. An adapter tells it that a prefill begins, that
a layer is about to run, that it has run, and that the prefill is over:

    begin(visibility, ...)                  once per forward call that brings encoder states
    before_layer(rank, cache layer)         -> which columns the layer receives
    after_layer(rank, cache layer, ...)     the policy decides; the cache keeps
    end()                                   the receipt is written

Decoding never comes here: it reads what the cache layers hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvprune.cache import CrossKVLayer
from kvprune.errors import SelectionError, UnsupportedCacheError
from kvprune.policy import CrossKVPolicy
from kvprune.report import CompressionReport, LayerReceipt
from kvprune.selection import Decision, Selection
from kvprune.view import LayerView
from kvprune.visibility import Visibility

__all__ = ["CrossKVManager"]


@dataclass
class _Prefill:
    """What is known while one prefill runs; dropped when it ends."""

    visibility: Visibility
    first_new: int
    fingerprints: Callable[[], Tensor]
    onward: Selection | None = None
    layers: dict[int, CrossKVLayer] = field(default_factory=dict)

    @property
    def new_columns(self) -> int:
        return self.visibility.columns - self.first_new

    def arriving(self, received: Selection | None) -> Visibility:
        """Visibility of the columns that arrive at a layer: all new ones, or the survivors among them."""
        new = self.visibility.from_column(self.first_new)
        return new if received is None else new.at(received.indices[:, 0], received.valid[:, 0])


class CrossKVManager:
    """Joins one policy with the cache layers of one model.

    Args:
        policy: Decides.
        seed: For policies that draw random numbers.
        layer_indices: The model's cross-attention layers in order; their positions are the ranks.
    """

    def __init__(self, policy: CrossKVPolicy, seed: int, layer_indices: Sequence[int]) -> None:
        self.policy = policy
        self.seed = seed
        self.layer_indices = tuple(layer_indices)
        self.report = CompressionReport(policy=policy.spec, seed=seed)
        # Columns and validity of the entries that the latest prefill left, by layer index.
        self._held: dict[int, tuple[Tensor, Tensor, int]] = {}
        self._attended: dict[int, Selection | None] = {}
        self._prefill: _Prefill | None = None

    @property
    def in_prefill(self) -> bool:
        """Whether a forward call that brings encoder states is running."""
        return self._prefill is not None

    @property
    def selections(self) -> Mapping[int, Selection]:
        """Columns that decoding uses since the latest prefill, by layer index."""
        return {layer_idx: Selection(*held) for layer_idx, held in self._held.items()}

    @property
    def prefill_selections(self) -> Mapping[int, Selection | None]:
        """Columns that the latest prefill attended to, by layer index; None for all there were."""
        return dict(self._attended)

    def begin(self, visibility: Visibility, new_columns: int, fingerprints: Callable[[], Tensor]) -> None:
        """Open a prefill.

        Args:
            visibility: Of all columns, those of earlier images included.
            new_columns: How many of the last columns arrive in this call.
            fingerprints: Returns int64 ``[B]``, what random policies are seeded with (`kvprune.seeding`).
        """
        self.report.count_encoder_input()
        first_new = visibility.columns - new_columns
        self._prefill = _Prefill(visibility, first_new, fingerprints)

    def before_layer(self, rank: int, layer: CrossKVLayer) -> Selection | None:
        """Announce to a cache layer what arrives, and return it: None for all new columns.

        Raises:
            UnsupportedCacheError: If the mask covers other columns than the cache has seen.
        """
        prefill = self._running()
        if layer.columns != prefill.first_new:
            raise UnsupportedCacheError(
                f"the mask covers {prefill.visibility.columns} columns, {prefill.new_columns} of them new, "
                f"but layer {self.layer_indices[rank]} has seen {layer.columns} before; pass a "
                "cross-attention mask over all images of the conversation, and features of the new ones only"
            )
        layer.announce(prefill.onward)
        return prefill.onward

    def after_layer(
        self,
        rank: int,
        layer: CrossKVLayer,
        *,
        scaling: float,
        queries: Tensor | None = None,
        raw_keys: Tensor | None = None,
    ) -> None:
        """Let the policy decide about a layer that has just attended, and apply the decision."""
        prefill = self._running()
        received = prefill.onward
        arriving = prefill.arriving(received)
        first = layer.keys.shape[-2] - arriving.columns
        view = LayerView(
            keys=layer.keys[..., first:, :],
            values=layer.values[..., first:, :],
            visibility=arriving,
            layer_idx=self.layer_indices[rank],
            rank=rank,
            num_layers=len(self.layer_indices),
            scaling=scaling,
            seed=self.seed,
            fingerprints=prefill.fingerprints,
            policy_name=self.policy.name,
            # Draft rows come last; visibility does not have them.
            captured_queries=None if queries is None else queries[:, :, : arriving.live.shape[1]],
            captured_raw_keys=raw_keys,
        )
        attended = None if layer.slots is None else Selection.from_mask(layer.held_columns())
        with torch.no_grad():
            decision = self.policy.select(view)
            _check(decision, view, self.policy.name)
            if decision.cache is not None or not self.policy.keeps_invisible:
                layer.retain(self._kept(prefill, decision, arriving, layer, first))
            if decision.onward is not None:
                prefill.onward = _compose(received, decision.onward)
        self._attended[view.layer_idx] = attended
        self._held[view.layer_idx] = (*layer.entries(), layer.columns)
        prefill.layers[rank] = layer

    def end(self, *, completed: bool) -> None:
        """Close a prefill; write its receipt if it came to its end."""
        prefill, self._prefill = self._prefill, None
        if prefill is None or not completed or not prefill.layers:
            return
        visible = prefill.visibility.decode
        receipts = []
        kept = []
        for rank, layer in sorted(prefill.layers.items()):
            receipts.append(
                LayerReceipt(
                    layer_idx=self.layer_indices[rank],
                    columns=layer.columns,
                    width=layer.keys.shape[-2],
                    bytes_held=layer.bytes_held,
                    bytes_full=layer.bytes_full,
                    bytes_of_bookkeeping=layer.bytes_of_bookkeeping,
                )
            )
            slots, valid = layer.entries()
            seen = visible.to(slots.device)[:, None].expand(-1, slots.shape[1], -1)
            counted = (seen.gather(-1, slots) & valid).sum(-1)
            kept.append(counted.double().mean(-1).to(visible.device))
        self.report.add_prefill(receipts, kept=torch.stack(kept).tolist(), visible=visible.sum(-1).tolist())

    def _running(self) -> _Prefill:
        if self._prefill is None:
            raise UnsupportedCacheError(
                "a cross-attention layer received encoder states outside the model's own forward call; "
                "call the model that was given to compress()"
            )
        return self._prefill

    def _kept(
        self, prefill: _Prefill, decision: Decision, arriving: Visibility, layer: CrossKVLayer, first: int
    ) -> Tensor:
        """Return which entries of a layer stay, bool ``[B, H or 1, W]``."""
        device = layer.keys.device
        decodable = prefill.visibility.decode_units
        new = arriving.by_column(decodable)[:, None].to(device)
        if decision.cache is not None:
            # A sample to which no image came selects a placeholder of what it cannot see; that goes here.
            new = new & decision.cache.to_mask().to(device)
        if first == 0:
            return new
        # Entries of earlier images stay as long as decoding can see them.
        slots = layer.entries()[0][..., :first].to(prefill.visibility.units.device)
        batch, heads, _ = slots.shape
        all_units = prefill.visibility.units[:, None].expand(batch, heads, -1)
        units = all_units.gather(-1, slots)
        old = decodable[:, None].expand(-1, heads, -1).gather(-1, units).to(device)
        width = max(heads, new.shape[1])
        return torch.cat([old.expand(-1, width, -1), new.expand(-1, width, -1)], dim=-1)


def _compose(received: Selection | None, onward: Selection) -> Selection:
    """Express a selection among received columns in terms of all new columns."""
    if received is None:
        return onward
    return Selection(received.indices.gather(-1, onward.indices), onward.valid, received.columns)


def _check(decision: object, view: LayerView, policy: str) -> None:
    """Refuse a decision that breaks KV01, KV03, KV04 or KV05, naming the policy and the layer.

    Raises:
        SelectionError: Citing the invariant.
    """
    where = f"policy {policy!r} at layer {view.layer_idx}"
    if not isinstance(decision, Decision):
        raise SelectionError(
            f"{where}: select returned {type(decision).__name__}, expected a Decision(cache=..., onward=...)"
        )
    batch, heads, columns, _ = view.keys.shape
    for what, selection, visible in (
        ("cache", decision.cache, view.visible),
        ("onward", decision.onward, view.visible_in_prefill),
    ):
        if selection is None:
            continue
        shape = list(selection.indices.shape)
        if selection.columns != columns or shape[0] != batch or shape[1] not in (1, heads):
            raise SelectionError(
                f"KV01: {where}: {what} selects {shape} out of {selection.columns} columns, expected "
                f"[{batch}, {heads} or 1, K] out of {columns}"
            )
        kept = selection.to_mask()
        visible = visible.to(kept.device)[:, None]
        sees = visible.any(-1, keepdim=True)
        hidden_kept = kept & ~visible & sees
        visible_dropped = visible & ~kept
        padding, starved = torch.stack(
            [
                (hidden_kept.any(-1) & visible_dropped.any(-1)).any(),
                _starved(view, kept, visible),
            ]
        ).tolist()
        if padding:
            raise SelectionError(
                f"KV04: {where}: {what} keeps columns that no row can see while it drops visible ones; "
                "select from view.visible (this layer's cache) or view.visible_in_prefill (onward)"
            )
        if starved:
            raise SelectionError(
                f"KV03: {where}: {what} keeps no column of a visibility group (an image that some text row "
                "attends to); keep at least one column of each group in view.groups, as scoring.keep_top does"
            )


def _starved(view: LayerView, kept: Tensor, visible: Tensor) -> Tensor:
    """Return whether some visibility group with visible columns keeps none of them (a bool scalar)."""
    groups = torch.where(visible[:, 0], view.groups.to(kept.device), -1)
    width = int(groups.max()) + 2
    slots = (groups + 1)[:, None].expand_as(kept)
    zeros = torch.zeros(*kept.shape[:2], width, dtype=torch.int64, device=kept.device)
    present = zeros.scatter_add(-1, slots, torch.ones_like(slots))
    survivors = zeros.scatter_add(-1, slots, kept.to(torch.int64))
    return ((present > 0) & (survivors == 0))[..., 1:].any()
