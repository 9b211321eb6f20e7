"""Measures one prefill: bytes before and after each decision, the time decisions take, what is kept.

Everything is read off the tensors at the moment of which the receipt speaks; nothing is estimated.
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
"""Of a mean of whole numbers over heads and layers; one token too many in one layer is more than that."""


class Stopwatch:
    """Seconds that a block takes, on the device where its work is done."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._seconds = 0.0

    def __enter__(self) -> Self:
        if self._on_cuda:  # kernels run later than they are called: the device takes the time
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
        """What the block took; on CUDA this waits for it to end."""
        if self._events is None:
            return self._seconds
        self._events[1].synchronize()
        milliseconds: float = self._events[0].elapsed_time(self._events[1])
        return milliseconds / 1000


@dataclass
class _Layer:
    """Bytes of one layer before the image came, while it attended and decided, and of what stays."""

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
    """What one prefill did, layer by layer.

    Args:
        cached: Whether there is a cache; without one, nothing is held afterwards.
    """

    def __init__(self, *, cached: bool) -> None:
        self.cached = cached
        self._layers: dict[int, _Layer] = {}
        self._copies = 1
        self._waited = False
        self._chosen: tuple[Stopwatch, ...] = ()
        self._text: list[tuple[TextReceipt, weakref.ref[TextKVLayer], Stopwatch]] = []
        self._text_kept: list[Tensor] = []

    def chosen(self, watch: Stopwatch) -> None:
        """Note a decision before the first layer; its time counts for that layer."""
        self._chosen = (watch,)

    def pruned_text(
        self, layer_idx: int, layer: TextKVLayer, watch: Stopwatch, drafts: int, kept: Tensor
    ) -> None:
        """Note what a self-attention layer holds after a decision about it.

        Args:
            layer_idx: Of the layer.
            layer: The layer, pruned.
            watch: Around the decision.
            drafts: Draft tokens at the end, which are not counted.
            kept: Share of the entries that there were, for each of R rows.
        """
        width, tokens = layer.held - drafts, layer.seen - drafts
        each = layer.bytes_held // layer.held
        receipt = TextReceipt(
            layer_idx=layer_idx,
            tokens=tokens,
            width=width,
            bytes_held=each * width,
            bytes_full=each * tokens,
        )
        self._text.append((receipt, weakref.ref(layer), watch))
        self._text_kept.append(kept)

    def waited(self) -> None:
        """Note that all layers kept everything until now, when the policy decides about them."""
        self._waited = True

    def arrives(self, layer_idx: int, layer: CrossKVLayer) -> None:
        """Note what a layer holds before new columns come."""
        self._layers[layer_idx] = _Layer(weakref.ref(layer), layer.bytes_held)

    def attended(self, layer_idx: int, layer: CrossKVLayer) -> None:
        """Note what was alive while a layer attended to all that came."""
        # Where rows are held as one, each row of the batch was projected all the same.
        projected = layer.bytes_held * layer.copies if layer.copies > 1 else 0
        self._layers[layer_idx].bytes_attended = layer.bytes_held
        self._layers[layer_idx].bytes_projected = layer.bytes_held + layer.bytes_read + projected
        self._copies = layer.copies

    def decided(
        self, layer_idx: int, layer: CrossKVLayer, watches: tuple[Stopwatch, ...], visible: Tensor
    ) -> None:
        """Note what a layer holds after the decision.

        Args:
            layer_idx: Of the layer.
            layer: The layer, pruned.
            watches: Around the decision.
            visible: bool ``[R, S]``, what decoding can see.
        """
        record = self._layers[layer_idx]
        record.watches, record.bytes_after = (*self._chosen, *watches), layer.bytes_held
        self._chosen = ()
        if record.bytes_after < record.bytes_attended:  # what stays was gathered while all was alive
            record.bytes_gathering = record.bytes_attended + record.bytes_after
        record.columns, record.widths, record.bytes_full = layer.columns, layer.widths, layer.bytes_full
        record.bytes_of_bookkeeping = layer.bytes_of_bookkeeping
        slots, valid = layer.entries()
        seen = visible.to(slots.device)[:, None].expand(-1, slots.shape[1], -1)
        record.kept = (seen.gather(-1, slots) & valid).sum(-1).double().mean(-1)

    @property
    def is_empty(self) -> bool:
        """Whether no layer has decided."""
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
            report: To add to.
            visible: bool ``[R, S]``, what decoding can see.
            budget: What each sample was to keep exactly, if the policy has such a budget.
            scope: Over what the budget is exact: each "head" and the mean over heads of a "layer" are counted
                by layer, "model" is the mean over layers.
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
        """Warn about what a user may not expect.

        Args:
            report: To add to.
            kept: Tokens kept by layer and sample, mean over heads.
            seen: Tokens that decoding can see, by sample.
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
        # Without a cache, the layer that decides has attended to everything.
        if self.cached and budget is not None and _exceeds(budget, kept, seen, scope):
            report.warn("the budget was exceeded where one token of each visibility group had to stay (KV03)")

    def _receipt(self, layer_idx: int, record: _Layer, decisions: int) -> LayerReceipt:
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
        """Most bytes of keys and values that were alive at once."""
        layers: Sequence[_Layer] = list(self._layers.values())
        peak = 0
        for number, layer in enumerate(layers):
            earlier, later = layers[:number], layers[number + 1 :]
            # While a layer attends, earlier ones hold what they kept, or all if decisions wait for the end.
            done = sum(one.bytes_attended if self._waited else one.bytes_after for one in earlier)
            attending = (done if self.cached else 0) + sum(one.bytes_before for one in later)
            peak = max(peak, attending + max(layer.bytes_projected, layer.bytes_attended))
            # While what it keeps is gathered, later ones hold nothing new yet, or all.
            kept = sum(one.bytes_after for one in earlier) if self.cached else 0
            kept += sum(one.bytes_attended if self._waited else one.bytes_before for one in later)
            peak = max(peak, kept + layer.bytes_gathering)
        return peak


def _exceeds(budget: Budget, kept: Sequence[Sequence[float]], seen: Sequence[int], scope: str) -> bool:
    """Return whether some sample keeps more than its budget."""
    if scope == "model":
        kept = [[sum(layers) / len(kept) for layers in zip(*kept, strict=True)]]
    return any(
        tokens > budget.resolve(total) + _ROUNDING
        for by_sample in kept
        for tokens, total in zip(by_sample, seen, strict=True)
        if total
    )
