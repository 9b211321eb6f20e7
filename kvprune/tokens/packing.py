"""Rearranges entries and rows: a mask of entries as padded indices, held rows for each of their copies."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack_left", "repeat_rows"]


def pack_left(kept: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the indices of the true entries of each row, in order, and which of them are not padding.

    Padding repeats the last true entry of its row, or the first entry of a row without a true one.

    Args:
        kept: bool ``[..., S]``.
        width: The largest number of true entries in a row. By default it is computed, which costs one host
            transfer.

    Returns:
        Indices int64 ``[..., width]`` and validity, bool of the same shape. Valid entries come first.

    Example:
        >>> indices, valid = pack_left(torch.tensor([[True, False, True], [False, True, False]]))
        >>> indices.tolist()
        [[0, 2], [1, 1]]
        >>> valid.tolist()
        [[True, True], [True, False]]
    """
    counts = kept.sum(-1, keepdim=True)  # [..., 1]
    if width is None:
        width = int(counts.max())
    # A stable sort of "dropped" moves kept entries to the front and preserves their order.
    indices = (~kept).to(torch.uint8).argsort(dim=-1, stable=True)[..., :width]  # [..., width]
    valid = torch.arange(width, device=kept.device) < counts  # [..., width]
    if width == 0:
        return indices, valid
    last = indices.gather(-1, (counts - 1).clamp(min=0))  # [..., 1]
    return torch.where(valid, indices, last), valid


def repeat_rows(held: Tensor, copies: int) -> Tensor:
    """Return ``[R, ...]`` for each of the ``copies`` rows that share a row, ``[R * copies, ...]``.

    A view if there is one copy or one row, otherwise a copy.

    Example:
        >>> repeat_rows(torch.tensor([[1], [2]]), 2).tolist()
        [[1], [1], [2], [2]]
    """
    if copies == 1:
        return held
    if held.shape[0] == 1:
        return held.expand(copies, *held.shape[1:])
    return held.repeat_interleave(copies, dim=0)
