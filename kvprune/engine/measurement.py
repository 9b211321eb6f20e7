"""Measures one prefill: bytes before and after each decision, run time of decisions, tokens kept.

Everything is read from the tensors at the moment that the receipt describes; nothing is estimated.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

import torch
from torch import Tensor

from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.cache.text_layer import TextKVLayer
from kvprune.engine.receipts import LayerReceipt, TextReceipt
from kvprune.engine.report import CompressionReport
from kvprune.tokens.budget import Budget

__all__ = ["PrefillRecord", "Stopwatch"]

_ROUNDING = 1e-6
"""Tolerance for means of token counts over heads and layers; one extra token in one layer exceeds it."""


class Stopwatch:
    """Context manager that measures the seconds of its block on a device."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._seconds = 0.0

    def __enter__(self) -> Self:
        if self._on_cuda:  # kernels run asynchronously, so the device itself must measure
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[0].record()
        self._started = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._seconds = time.perf_counter() - self._started
        if self._events is not None:
            self._events[1].record()

    @property
    def seconds(self) -> float:
        """Seconds that the block took; on CUDA this waits for the device."""
        if self._events is None:
            return self._seconds
        self._events[1].synchronize()
        milliseconds: float = self._events[0].elapsed_time(self._events[1])
        return milliseconds / 1000


@dataclass
class _Layer:
    """Measurements of one cross-attention layer, in the order in which they are taken.

    Args:
        reference: The cache layer.
        bytes_before: Keys and values held before the new columns arrive.
        bytes_attended: Held while the layer attends.
        bytes_projected: Alive while the layer attends: held, and projections and copies beside them.
        bytes_gathering: Alive while kept entries are copied out of all; 0 if nothing is dropped.
        bytes_after: Held after the decision.
        columns: Columns seen.
        widths: Entries held per KV head, by bits.
        bytes_full: What stock transformers would hold.
        bytes_of_bookkeeping: Column numbers, validity and bias.
        kept: float64 ``[R]``, visible tokens kept, mean over heads; None before the decision.
        watches: Around the decisions about this layer.
    """

    reference: weakref.ref[CrossKVLayer]
    bytes_before: int
    bytes_attended: int = 0
    bytes_projected: int = 0
    bytes_gathering: int = 0
    bytes_after: int = 0
    columns: int = 0
    widths: Mapping[int, int] = field(default_factory=dict)
    bytes_full: int = 0
    bytes_of_bookkeeping: int = 0
    kept: Tensor | None = None
    watches: tuple[Stopwatch, ...] = ()


class PrefillRecord:
    """Measurements of one prefill, layer by layer.

    The methods stand in the order in which a forward call needs them.

    Args:
        cached: Whether there is a cache; without one, nothing is held after the call.
        before: Around what ran before the first layer for the policy; counts for that layer.
    """

    def __init__(self, *, cached: bool, before: Stopwatch | None = None) -> None:
        self.cached = cached
        self._layers: dict[int, _Layer] = {}
        self._copies = 1
        self._deferred = False
        self._feature_watches: tuple[Stopwatch, ...] = () if before is None else (before,)
        self._text: list[tuple[TextReceipt, weakref.ref[TextKVLayer], Stopwatch]] = []
        self._text_kept: list[Tensor] = []

    def note_text_decision(self, layer_idx: int, layer: TextKVLayer, watch: Stopwatch, kept: Tensor) -> None:
        """Measure a self-attention layer after the decision about its text.

        Args:
            layer_idx: Index of the decoder layer.
            layer: The cache layer, pruned.
            watch: Around the decision.
            kept: float ``[R]``, entries kept / entries before pruning.
        """
        width, tokens = layer.held, layer.seen
        each = layer.bytes_held // width  # bytes of one entry, over all rows and heads
        receipt = TextReceipt(
            layer_idx=layer_idx,
            tokens=tokens,
            width=width,
            bytes_held=each * width,
            bytes_full=each * tokens,
        )
        self._text.append((receipt, weakref.ref(layer), watch))
        self._text_kept.append(kept)

    def note_feature_decision(self, watch: Stopwatch) -> None:
        """Note a decision before the first layer; its run time counts for that layer."""
        self._feature_watches += (watch,)

    def note_arrival(self, layer_idx: int, layer: CrossKVLayer) -> None:
        """Measure a layer before new columns arrive."""
        self._layers[layer_idx] = _Layer(weakref.ref(layer), layer.bytes_held)

    def note_attention(self, layer_idx: int, layer: CrossKVLayer) -> None:
        """Measure a layer that has attended to the new columns and is not pruned yet."""
        # Copies of a sample are held once, but the model has projected each row of the batch.
        projected = layer.bytes_held * layer.copies if layer.copies > 1 else 0
        self._layers[layer_idx].bytes_attended = layer.bytes_held
        self._layers[layer_idx].bytes_projected = layer.bytes_held + layer.bytes_read + projected
        self._copies = layer.copies

    def note_deferral(self) -> None:
        """Note that all layers have attended and hold all columns, because the policy decides only now."""
        self._deferred = True

    def note_decision(
        self, layer_idx: int, layer: CrossKVLayer, watches: tuple[Stopwatch, ...], visible: Tensor
    ) -> None:
        """Measure a layer after the decision about it.

        Args:
            layer_idx: Index of the decoder layer.
            layer: The cache layer, pruned.
            watches: Around the decision.
            visible: bool ``[R, S]``, columns that decoding can see.
        """
        record = self._layers[layer_idx]
        record.watches, record.bytes_after = (*self._feature_watches, *watches), layer.bytes_held
        self._feature_watches = ()
        if record.bytes_after < record.bytes_attended:  # kept entries were copied while all were alive
            record.bytes_gathering = record.bytes_attended + record.bytes_after
        record.columns, record.widths, record.bytes_full = layer.columns, layer.widths, layer.bytes_full
        record.bytes_of_bookkeeping = layer.bytes_of_bookkeeping
        slots, valid = layer.entries()  # [R, H or 1, K]
        seen = visible.to(slots.device)[:, None].expand(-1, slots.shape[1], -1)  # [R, H or 1, S]
        record.kept = (seen.gather(-1, slots) & valid).sum(-1).double().mean(-1)  # [R]

    @property
    def is_empty(self) -> bool:
        """Whether no layer has been decided about."""
        return all(layer.kept is None for layer in self._layers.values())

    def write(
        self,
        report: CompressionReport,
        visible: Tensor,
        budget: Budget | None,
        scope: Literal["head", "layer", "model"] = "head",
    ) -> None:
        """Add this prefill to a report.

        Args:
            report: The report.
            visible: bool ``[R, S]``, columns that decoding can see.
            budget: The exact budget of each sample; None if the policy has none.
            scope: Unit in which the budget is exact. "head" and "layer" are compared layer by layer (mean
                over heads), "model" by the mean over layers.
        """
        decided = {index: layer for index, layer in self._layers.items() if layer.kept is not None}
        before = {layer.layer_idx: layer.decisions for layer in report.layers}
        receipts = [self._receipt(index, layer, before.get(index, 0) + 1) for index, layer in decided.items()]
        kept = [layer.kept.to(visible.device) for layer in decided.values() if layer.kept is not None]
        rows, seen = torch.stack(kept).tolist(), visible.sum(-1).tolist()  # [L][R], [R]
        self._warn(report, rows, seen, budget, scope)
        report.add_prefill(
            receipts,
            [[tokens for tokens in by_sample for _ in range(self._copies)] for by_sample in rows],
            [total for total in seen for _ in range(self._copies)],
            bytes_peak=self._peak(),
            live=[layer.reference for layer in decided.values()] if self.cached else (),
        )
        report.add_text(
            [receipt for receipt, _, _ in self._text],
            torch.stack(self._text_kept).double().mean().item() if self._text else None,
            seconds=sum(watch.seconds for _, _, watch in self._text),
            live=[reference for _, reference, _ in self._text],
        )

    def _warn(
        self,
        report: CompressionReport,
        kept: Sequence[Sequence[float]],
        seen: Sequence[int],
        budget: Budget | None,
        scope: Literal["head", "layer", "model"],
    ) -> None:
        """Add warnings about results that a user may not expect.

        Args:
            report: The report.
            kept: Visible tokens kept, ``[L][R]``, mean over heads.
            seen: Tokens that decoding can see, ``[R]``.
            budget: See `write`.
            scope: See `write`.
        """
        if not self.cached:
            report.warn(
                "no cache (use_cache=False, or gradient checkpointing): nothing is held between forward "
                "calls, and each of them decides anew"
            )
        if 0 in seen:
            report.warn("some samples see no image: stock attends to everything there, and so does decoding")
        # Without a cache, the deciding layer itself has attended to all columns, whatever the budget.
        if self.cached and budget is not None and _exceeds(budget, kept, seen, scope):
            report.warn("the budget was exceeded where one token of each visibility group had to stay (KV03)")

    def _receipt(self, layer_idx: int, record: _Layer, decisions: int) -> LayerReceipt:
        """Return the receipt of one layer; without a cache, it holds nothing."""
        return LayerReceipt(
            layer_idx=layer_idx,
            columns=record.columns,
            width=sum(record.widths.values()),
            widths={str(bits): width for bits, width in record.widths.items()},
            bytes_held=record.bytes_after if self.cached else 0,
            bytes_full=record.bytes_full if self.cached else 0,
            bytes_of_bookkeeping=record.bytes_of_bookkeeping if self.cached else 0,
            decisions=decisions,
            seconds=sum(watch.seconds for watch in record.watches),
        )

    def _peak(self) -> int:
        """Return the peak bytes of keys and values, while each layer attends and while it is pruned."""
        layers: Sequence[_Layer] = list(self._layers.values())
        peak = 0
        for number, layer in enumerate(layers):
            earlier, later = layers[:number], layers[number + 1 :]
            # While a layer attends, earlier layers hold what they kept, or everything if decisions come at
            # the end; later layers hold what they held before.
            done = sum(one.bytes_attended if self._deferred else one.bytes_after for one in earlier)
            attending = (done if self.cached else 0) + sum(one.bytes_before for one in later)
            peak = max(peak, attending + max(layer.bytes_projected, layer.bytes_attended))
            # While its kept entries are copied, earlier layers are pruned; later layers hold nothing new yet,
            # or everything if decisions come at the end.
            kept = sum(one.bytes_after for one in earlier) if self.cached else 0
            kept += sum(one.bytes_attended if self._deferred else one.bytes_before for one in later)
            peak = max(peak, kept + layer.bytes_gathering)
        return peak


def _exceeds(budget: Budget, kept: Sequence[Sequence[float]], seen: Sequence[int], scope: str) -> bool:
    """Return whether some sample keeps more tokens than its budget; samples without an image do not count."""
    if scope == "model":
        kept = [[sum(layers) / len(kept) for layers in zip(*kept, strict=True)]]
    return any(
        tokens > budget.resolve(total) + _ROUNDING
        for by_sample in kept
        for tokens, total in zip(by_sample, seen, strict=True)
        if total
    )
