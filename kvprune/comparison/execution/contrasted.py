"""Answers of a contrast, for those who measure what a compression answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

from kvprune.engine.kept import KeptSelections
from kvprune.engine.report import CompressionReport
from kvprune.session.contrast import Contrast
from kvprune.tokens.selection import Selection

__all__ = ["Contrasted"]


class Contrasted:
    """A contrast that is read like a compression: what it says is that of its second branch.

    Args:
        contrast: The contrast, not attached.
    """

    def __init__(self, contrast: Contrast) -> None:
        self._contrast = contrast

    @property
    def report(self) -> CompressionReport:
        """What the second branch kept; the full branch holds `CompressionReport.bytes_full` besides."""
        return self._contrast.report.against

    @property
    def selections(self) -> Mapping[int, Selection]:
        """Columns that the second branch reads, by layer index."""
        return self._contrast.selections

    def recording(self) -> AbstractContextManager[Sequence[KeptSelections]]:
        """Keep what each prefill of the second branch decides."""
        return self._contrast.recording()

    def __enter__(self) -> Self:
        self._contrast.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._contrast.__exit__(kind, error, trace)
