"""Cuts the cross-attention mask of encoder-decoder models to the columns that each layer holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvprune.adapters.features import to_query_heads
from kvprune.cache.contents import Contents

__all__ = ["ColumnMask"]


class ColumnMask:
    """The masks of one decoder call, cut to held columns; layers that hold the same columns share one.

    Args:
        dtype: Dtype of additive masks that are created where stock has none.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        # (slots, bias, mask) of earlier layers. Looked up by identity, which needs no device transfer.
        self._made: list[tuple[Tensor, Tensor | None, Tensor | None]] = []

    def over(self, mask: Tensor | None, contents: Contents, module: Any) -> Tensor | None:
        """Cut a stock mask to the held columns, keeping its kind (bool, additive or none).

        If entries have a bias, the result is additive.

        Args:
            mask: ``[B, 1, T or 1, S]`` or None.
            contents: Entries that the layer holds while it attends.
            module: The attention module.

        Returns:
            ``[B, 1 or Hq, T or 1, K]``; None if every row may attend every entry.
        """
        slots, valid, bias = contents.slots, contents.valid, contents.bias
        if slots is None or valid is None:
            return mask
        for known, known_bias, made in self._made:
            if known is slots and known_bias is bias:
                return made
        cut = None
        if mask is not None or contents.ragged or bias is not None:
            copies, rows = contents.copies, (slots, valid)
            if copies > 1:
                rows = slots.repeat_interleave(copies, dim=0), valid.repeat_interleave(copies, dim=0)
            cut = self._cut(mask, *rows)
            if bias is not None:
                cut = self._biased(cut, bias.repeat_interleave(copies, dim=0))
            cut = to_query_heads(cut, module)
        self._made.append((slots, bias, cut))
        return cut

    def _cut(self, mask: Tensor | None, slots: Tensor, valid: Tensor) -> Tensor:
        allowed = valid[:, :, None]  # [B, H or 1, 1, K]
        if mask is None:
            cut = torch.zeros(allowed.shape, dtype=self._dtype, device=slots.device)
        else:
            batch, heads = slots.shape[:2]
            index = slots[:, :, None].expand(-1, -1, mask.shape[2], -1)  # [B, H or 1, T or 1, K]
            cut = mask.expand(batch, heads, -1, -1).gather(-1, index)
        if cut.dtype == torch.bool:
            return cut & allowed
        return cut.masked_fill(~allowed, torch.finfo(cut.dtype).min)

    def _biased(self, cut: Tensor, bias: Tensor) -> Tensor:
        if cut.dtype == torch.bool:  # make it additive
            lowest = torch.finfo(self._dtype).min
            cut = torch.zeros_like(cut, dtype=self._dtype).masked_fill(~cut, lowest)
        return cut + bias[:, :, None].to(cut)  # [B, H or 1, T or 1, K]
