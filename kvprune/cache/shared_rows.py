"""Finds rows of a batch that are copies of one sample, such as its beams in prefill, to hold them once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["SharedRows", "find_shared_rows"]


class SharedRows:
    """Number of consecutive batch rows that share one held row; one object for all layers of a prefill.

    Args:
        copies: Rows of the batch for each held row, at least 1.
    """

    def __init__(self, copies: int = 1) -> None:
        self.copies = copies
        self._asked: tuple[Tensor, int] | None = None
        self._answer = True

    def unchanged_by(self, beam_idx: Tensor) -> bool:
        """Whether a reordering only permutes copies of the same sample, as beam search does.

        False without copies. The result is cached, so that all layers need one device transfer together.

        Args:
            beam_idx: int64 ``[B]``, the old row of each new row.
        """
        if self.copies == 1:
            return False
        if self._asked is None or self._asked[0] is not beam_idx or self._asked[1] != beam_idx._version:
            places = torch.arange(len(beam_idx), device=beam_idx.device)
            # Each row must come from the same group of copies.
            self._answer = torch.equal(beam_idx // self.copies, places // self.copies)
            self._asked = beam_idx, beam_idx._version
        return self._answer


def find_shared_rows(
    small: Sequence[Tensor | None],
    large: Sequence[Tensor | None],
    most: int | None = None,
) -> SharedRows:
    """Find the largest number of copies such that the whole batch consists of groups of equal rows.

    Args:
        small: Tensors that are cheap to compare, such as token ids and masks, ``[B, ...]``; None is skipped.
        large: Tensors that are compared only where all small ones are equal, such as pixels, ``[B, ...]``.
        most: Upper limit of copies; None for no limit.
    """
    cheap = [tensor for tensor in small if tensor is not None]
    batch = cheap[0].shape[0]
    if batch == 1 or most == 1:
        return SharedRows()
    device = cheap[0].device
    alike = torch.stack([_like_the_row_before(tensor).to(device) for tensor in cheap]).all(0)  # [B - 1]
    same: list[bool] = alike.tolist()  # one transfer to the host, in prefill only
    costly = [tensor for tensor in large if tensor is not None]
    for row, so_far in enumerate(same):
        same[row] = so_far and all(torch.equal(tensor[row], tensor[row + 1]) for tensor in costly)
    for copies in range(min(batch, most or batch), 1, -1):
        if batch % copies == 0 and all(same[row - 1] for row in range(1, batch) if row % copies):
            return SharedRows(copies)
    return SharedRows()


def _like_the_row_before(tensor: Tensor) -> Tensor:
    """Return whether each row but the first equals the row before it, bool ``[B - 1]``."""
    return (tensor[1:] == tensor[:-1]).flatten(1).all(1)
