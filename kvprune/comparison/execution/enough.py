"""Ends the transcript of a long recording that has grown beyond its limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Enough"]


class Enough:
    """A stopping criterion that limits how much is written about each recording, over all of its windows.

    A pruned cache may end in endless repetition. Whisper writes such a window to the end, throws away what
    follows its last timestamp, and begins the next window there, so it may read hundreds of windows.

    What is thrown away counts, too. A recording that has its limit gets one token in each later window; that
    is no timestamp to go on from, so Whisper moves on by whole windows to the end.

    Args:
        most: For each recording of the batch, most tokens to write, all windows together.
        padding: The token that fills a row that has ended.
    """

    def __init__(self, most: Sequence[int], padding: int) -> None:
        self._left = list(most)
        self._rows: list[int] = []
        self._prompt = 0
        self._written: Tensor | None = None
        self._padding = padding

    def begin_window(self, progress: Tensor) -> None:
        """Note which recordings the next window is read of; ``generate`` calls it as ``monitor_progress``.

        Args:
            progress: int64 ``[B, 2]``, where the next window of each recording begins and where it ends.
        """
        self._settle()
        self._rows = [row for row, (at, end) in enumerate(progress.tolist()) if at < end]

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Return which rows have written enough, bool ``[rows]``; called after each token."""
        if self._written is None:
            self._prompt = input_ids.shape[1] - 1
        self._written = input_ids
        new = input_ids.shape[1] - self._prompt
        return torch.tensor([new >= self._left[row] for row in self._rows], device=input_ids.device)

    def _settle(self) -> None:
        """Count what the latest window has written."""
        if self._written is None:
            return
        counts = (self._written[:, self._prompt :] != self._padding).sum(-1).tolist()
        for row, count in zip(self._rows, counts, strict=True):
            self._left[row] -= count
        self._written = None
