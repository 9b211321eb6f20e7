"""What the latest prefill of a compression kept, and earlier ones for those who ask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from kvprune.engine.kept import KeptSelections
from kvprune.engine.receipts import Window
from kvprune.engine.report import CompressionReport

__all__ = ["History"]


@dataclass
class History:
    """Tells the report which window each prefill has read, and hands recorders what it kept.

    Args:
        report: Has the numbers of the latest prefill.

    Attributes:
        kept: What the latest prefill kept.
        window: What the prefill that begins reads of its recordings; None if it reads no window. An adapter
            whose model reads recordings window by window sets it before each prefill.
        keeps_features: Whether the features of new tokens of the latest prefill are kept, for oracles.
    """

    report: CompressionReport
    kept: KeptSelections = field(default_factory=KeptSelections)
    window: Window | None = None
    keeps_features: bool = False
    _recorders: list[list[KeptSelections]] = field(default_factory=list)

    def add(self, kept: KeptSelections) -> None:
        """Add a prefill that has just completed, and is in the report."""
        if not self.keeps_features:
            kept.forget_features()
        self.kept = kept
        self.report.add_window(self.window)
        for recorder in self._recorders:
            recorder.append(kept)

    @contextmanager
    def recording(self) -> Iterator[Sequence[KeptSelections]]:
        """Yield what each prefill in this block kept, in order; the sequence grows while the model runs."""
        recorder: list[KeptSelections] = []
        self._recorders.append(recorder)
        try:
            yield recorder
        finally:
            self._recorders = [one for one in self._recorders if one is not recorder]
