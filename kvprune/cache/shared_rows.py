"""Rows of a batch that are copies of one sample, such as its beams in prefill, and are held once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["SharedRows", "may_share", "share_repeated"]


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
        # A tensor that was made in inference mode does not say whether it has changed since.
        known = self._asked is not None and self._asked[0] is beam_idx and not beam_idx.is_inference()
        if self._asked is None or not known or self._asked[1] != beam_idx._version:
            places = torch.arange(len(beam_idx), device=beam_idx.device)
            # Each row must come from the same group of copies.
            self._answer = torch.equal(beam_idx // self.copies, places // self.copies)
            self._asked = beam_idx, 0 if beam_idx.is_inference() else beam_idx._version
        return self._answer


def may_share(decoder: nn.Module) -> bool:
    """Whether rows of equal inputs stay equal: not with dropout, nor if gradients must flow to each row."""
    return not torch.is_grad_enabled() and not decoder.training


def share_repeated(
    repeats: int, small: Sequence[Tensor | None], large: Sequence[Tensor | None]
) -> SharedRows:
    """Share the rows that `generate` has made from one sample, unless their inputs differ by now.

    Rows are never shared because they look alike: equal inputs prove nothing about what a model adds to each
    row, such as the adapter of its request.

    Args:
        repeats: Consecutive rows of the batch that come from one sample.
        small: Tensors that are cheap to compare, such as token ids and masks, ``[B, ...]``; None is skipped.
        large: Tensors that are compared only where all small ones are equal, such as pixels, ``[B, ...]``.
    """
    given = [[tensor for tensor in tensors if tensor is not None] for tensors in (small, large)]
    if repeats == 1 or any(tensor.shape[0] % repeats for tensors in given for tensor in tensors):
        return SharedRows()
    alike = all(_are_repeated(tensor, repeats) for tensors in given for tensor in tensors)
    return SharedRows(repeats) if alike else SharedRows()


def _are_repeated(tensor: Tensor, repeats: int) -> bool:
    """Return whether each group of rows of ``[B, ...]`` holds the same row; one device transfer."""
    rows = tensor.unflatten(0, (-1, repeats))  # [samples, repeats, ...]
    return torch.equal(rows[:, 1:], rows[:, :1].expand_as(rows[:, 1:]))
