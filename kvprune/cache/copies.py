"""Rows of a batch that are copies of one sample, as beams and return sequences are in prefill: held once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Twins", "find_twins"]


class Twins:
    """How many consecutive rows of the batch are held as one; shared by the layers of one prefill.

    Args:
        copies: Rows of the batch for each row that is held, at least 1.
    """

    def __init__(self, copies: int = 1) -> None:
        self.copies = copies
        self._asked: tuple[Tensor, int] | None = None
        self._answer = True

    def stay(self, beam_idx: Tensor) -> bool:
        """Whether a reordering moves rows only among copies of the same sample, as beam search does.

        Asks the device once for all layers that are reordered alike.
        """
        if self.copies == 1:
            return False
        if self._asked is None or self._asked[0] is not beam_idx or self._asked[1] != beam_idx._version:
            places = torch.arange(len(beam_idx), device=beam_idx.device)
            self._answer = torch.equal(beam_idx // self.copies, places // self.copies)
            self._asked = beam_idx, beam_idx._version
        return self._answer


def find_twins(
    small: Sequence[Tensor | None],
    large: Sequence[Tensor | None],
    most: int | None = None,
) -> Twins:
    """Return how many consecutive rows are equal everywhere: the largest number that fits the whole batch.

    Args:
        small: What is cheap to compare, such as token ids and masks, ``[B, ...]``; None is left out.
        large: What is compared only where all of those are equal, such as pixels, ``[B, ...]``.
        most: No more than this many rows are held as one.
    """
    cheap = [tensor for tensor in small if tensor is not None]
    batch = cheap[0].shape[0]
    if batch == 1 or most == 1:
        return Twins()
    device = cheap[0].device
    alike = torch.stack([_like_the_row_before(tensor).to(device) for tensor in cheap]).all(0)
    same: list[bool] = alike.tolist()  # one host transfer; in prefill only
    costly = [tensor for tensor in large if tensor is not None]
    for row, so_far in enumerate(same):
        same[row] = so_far and all(torch.equal(tensor[row], tensor[row + 1]) for tensor in costly)
    for copies in range(min(batch, most or batch), 1, -1):
        if batch % copies == 0 and all(same[row - 1] for row in range(1, batch) if row % copies):
            return Twins(copies)
    return Twins()


def _like_the_row_before(tensor: Tensor) -> Tensor:
    """Whether each row but the first equals the one before it, bool ``[B - 1]``."""
    return (tensor[1:] == tensor[:-1]).flatten(1).all(1)
