"""The report of a compression: the budget that was requested, what was kept and held, and what it cost.

Everything is measured from the tensors in the cache and never estimated. `CompressionReport.to_dict` has a
documented schema (docs/receipts.md), and `CompressionReport.verify` measures the live cache again.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.cache.text_layer import TextKVLayer
from kvprune.engine.guidance import GuideReceipt
from kvprune.engine.live_check import check_layers, check_text_layers
from kvprune.engine.receipts import (
    LayerReceipt,
    TextReceipt,
    Window,
    WindowReceipt,
)
from kvprune.engine.report_facts import ReportFacts
from kvprune.engine.report_text import report_text
from kvprune.errors import ReceiptError

__all__ = ["SCHEMA", "CompressionReport"]

SCHEMA = 2
"""Schema version of `CompressionReport.to_dict`; raised when a field is removed or changes its meaning."""

_LiveLayer = weakref.ref[CrossKVLayer]


@dataclass
class CompressionReport(ReportFacts):
    """What one compression has done so far; `ReportFacts` lists its attributes."""

    _live: tuple[_LiveLayer, ...] = field(default=(), repr=False, compare=False)
    _live_text: tuple[weakref.ref[TextKVLayer], ...] = field(default=(), repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_live": (), "_live_text": ()}  # copies and pickles have no cache

    def count_encoder_input(self, *, reread: bool = False) -> None:
        """Count a forward call that brings encoder states, and whether its last token was read again."""
        self.encoder_inputs += 1
        self.rereads += reread

    def note_draw(self) -> None:
        """Note that the policy drew random numbers."""
        self.drew = True

    def add_guide(self, receipt: GuideReceipt) -> None:
        """Add the cost of a guide."""
        self.guide = receipt.plus(self.guide)

    def warn(self, text: str) -> None:
        """Add a warning unless it was added before."""
        if text not in self.warnings:
            self.warnings = (*self.warnings, text)

    def add_prefill(
        self,
        layers: Sequence[LayerReceipt],
        kept: Sequence[Sequence[float]],
        visible: Sequence[int],
        *,
        bytes_peak: int = 0,
        live: Sequence[_LiveLayer] = (),
    ) -> None:
        """Add the receipts of one prefill.

        Args:
            layers: One receipt per layer.
            kept: Visible tokens that were kept, ``[L][B]``, mean over heads.
            visible: Tokens that decoding could see, ``[B]``.
            bytes_peak: Peak bytes of keys and values.
            live: Weak references to the cache layers, for `verify`; empty if there is no cache.
        """
        self.prefills += 1
        self.layers, self.bytes_peak, self._live = tuple(layers), bytes_peak, tuple(live)
        self.seconds += sum(layer.seconds for layer in layers)
        fractions = []
        for sample, seen in enumerate(visible):
            if seen == 0:
                fractions.append(float("nan"))
                continue
            fraction = sum(by_sample[sample] for by_sample in kept) / len(kept) / seen
            fractions.append(fraction)
            self._kept_sum += fraction
            self._kept_samples += 1
        self.kept_per_sample = tuple(fractions)
        self._visible = sum(visible) / len(visible) if visible else 0.0
        shares = [
            tokens / layer.columns
            for layer, by_sample in zip(layers, kept, strict=True)
            for tokens in by_sample
        ]
        self.kept_of_stored = sum(shares) / len(shares) if shares else float("nan")

    def add_loaded(
        self, file: str, layers: Sequence[LayerReceipt], facts: Mapping[str, Any], live: Sequence[_LiveLayer]
    ) -> None:
        """Begin with a cache that an earlier run has filled; ``facts`` are numbers of its latest prefill."""
        self.loaded, self.layers, self._live = file, tuple(layers), tuple(live)
        for name, number in facts.items():
            setattr(self, name, number)
        seen = [fraction for fraction in self.kept_per_sample if fraction == fraction]
        self._kept_sum, self._kept_samples = sum(seen), len(seen)

    def add_text(
        self,
        layers: Sequence[TextReceipt],
        kept: float | None,
        *,
        seconds: float = 0.0,
        live: Sequence[weakref.ref[TextKVLayer]] = (),
    ) -> None:
        """Add what the same prefill did to text; empty if the policy prunes no text.

        Args:
            layers: One receipt per self-attention layer.
            kept: Text entries kept / text entries before pruning; None if the policy prunes no text.
            seconds: Run time of the decisions.
            live: Weak references to the cache layers, for `verify`.
        """
        self.text_layers, self.text_kept_fraction = tuple(layers), kept
        self.seconds += seconds
        self._live_text = tuple(live)

    def add_window(self, window: Window | None) -> None:
        """Add where the prefill that was added last stands in its recordings; None if it reads no window."""
        if window is None:
            self.windows = ()
            return
        beams = len(self.kept_per_sample) // len(window.rows)
        receipt = WindowReceipt(
            rows=tuple(row for row in window.rows for _ in range(beams)),
            starts=tuple(start for start in window.starts for _ in range(beams)),
            attempt=window.attempt,
            kept_per_sample=self.kept_per_sample,
            bytes_peak=self.bytes_peak,
            layers=self.layers,
            visible=self._visible,
        )
        self.windows = (receipt,) if window.is_first else (*self.windows, receipt)

    def live_layers(self) -> list[tuple[LayerReceipt, _LiveLayer]]:
        """Return each receipt with the cache layer that it describes; empty without a cache."""
        return list(zip(self.layers, self._live, strict=False))

    def verify(self) -> int:
        """Measure the live cache again, and compare it with the receipts of the latest prefill.

        The memory behind the tensors is counted, too: a small view of a large buffer keeps all of it in
        memory.

        Returns:
            Bytes of keys and values in the live cache, equal to `bytes_held`.

        Raises:
            ReceiptError: If the cache was deleted (keep ``past_key_values``, for instance with
                ``return_dict_in_generate=True``), or differs from a receipt.
        """
        if not self.prefills and self.loaded is None:
            raise ReceiptError(f"{self.policy}: nothing was compressed yet, so there is nothing to verify")
        if not self._live:
            raise ReceiptError(
                f"{self.policy}: no cache belongs to this report (the model was called without one, or this "
                "is a copy of the report)"
            )
        check_layers(str(self.policy), self.layers, self._live)
        check_text_layers(str(self.policy), self.text_layers, self._live_text)
        return self.bytes_held

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready data; numbers that do not exist are null (docs/receipts.md)."""
        return {
            "schema": SCHEMA,
            "policy": self.policy.to_dict(),
            "spec": str(self.policy),
            "seed": self.seed,
            "drew": self.drew,
            "requested": dict(self.requested),
            "encoder_inputs": self.encoder_inputs,
            "prefills": self.prefills,
            "loaded": self.loaded,
            "rereads": self.rereads,
            "kept_fraction": _or_none(self.kept_fraction),
            "kept_of_stored": _or_none(self.kept_of_stored),
            "kept_per_sample": [_or_none(fraction) for fraction in self.kept_per_sample],
            "bytes_held": self.bytes_held,
            "bytes_full": self.bytes_full,
            "bytes_peak": self.bytes_peak,
            "bytes_of_bookkeeping": self.bytes_of_bookkeeping,
            "text_kept_fraction": self.text_kept_fraction,
            "text_bytes_held": self.text_bytes_held if self.text_layers else None,
            "text_bytes_full": self.text_bytes_full if self.text_layers else None,
            "seconds": self.seconds,
            "guide": None if self.guide is None else self.guide.to_dict(),
            "warnings": list(self.warnings),
            "weights": list(self.weights),
            "read_fraction": _or_none(self.read_fraction),
            "read_of_visible": _or_none(self.read_of_visible),
            "layers": [asdict(layer) for layer in self.layers],
            "steps": [asdict(layer) for layer in self.steps],
            "text_layers": [asdict(layer) for layer in self.text_layers],
            "windows": [window.to_dict() for window in self.windows],
        }

    def __str__(self) -> str:
        return report_text(self)


def _or_none(value: float) -> float | None:
    return None if value != value else value
