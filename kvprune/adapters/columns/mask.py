"""Cuts the cross-attention mask of encoder-decoder models to the columns that each layer holds."""

from __future__ import annotations

import torch
from torch import Tensor

from kvprune.adapters.sites import Site, by_query_head
from kvprune.cache.contents import Contents

__all__ = ["ColumnMask"]


class ColumnMask:
    """The masks of one decoder call, cut to held columns; layers that hold the same columns share one."""

    def __init__(self) -> None:
        # (slots, bias, mask) of earlier layers. Looked up by identity, which needs no device transfer.
        self._made: list[tuple[Tensor, Tensor | None, Tensor | None]] = []

    def over(self, mask: Tensor | None, contents: Contents, site: Site, text: Tensor) -> Tensor | None:
        """Cut a stock mask to the held columns, keeping its kind (bool, additive or none).

        If entries have a bias, the result is additive.

        Args:
            mask: ``[B, 1 or Hq, T or 1, S]`` or None.
            contents: Entries that the layer holds while it attends.
            site: Where the mask is used.
            text: ``[B, T, C]``, the hidden states that attend. Masks that are created have their dtype.

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
            cut = _cut(mask, *rows, site, text.dtype, ragged=contents.ragged)
            if bias is not None:
                cut = _biased(cut, bias.repeat_interleave(copies, dim=0), text.dtype)
            cut = site.fit_mask(cut, text.shape[1])
        self._made.append((slots, bias, cut))
        return cut


def _cut(
    mask: Tensor | None, slots: Tensor, valid: Tensor, site: Site, dtype: torch.dtype, *, ragged: bool
) -> Tensor:
    """Return a mask over the columns in ``slots``, ``[B, 1 or H, T or 1, K]``."""
    if mask is not None and mask.shape[1] > 1:  # stock has a mask for each query head
        slots, valid = (by_query_head(held, site.heads).expand(-1, site.heads, -1) for held in (slots, valid))
    allowed = valid[:, :, None]  # [B, H or 1, 1, K]
    if mask is None:
        cut = torch.zeros(allowed.shape, dtype=dtype, device=slots.device)
    else:
        batch, heads = slots.shape[:2]
        index = slots[:, :, None].expand(-1, -1, mask.shape[2], -1)  # [B, H or 1, T or 1, K]
        cut = mask.expand(batch, heads, -1, -1).gather(-1, index)
    if not ragged:
        return cut
    if cut.dtype == torch.bool:
        return cut & allowed
    return cut.masked_fill(~allowed, torch.finfo(cut.dtype).min)


def _biased(cut: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Add the bias of each entry, ``[B, H or 1, K]``, to a mask; it becomes additive."""
    if cut.dtype == torch.bool:
        cut = torch.zeros_like(cut, dtype=dtype).masked_fill(~cut, torch.finfo(dtype).min)
    return cut + bias[:, :, None].to(cut)  # [B, H or 1, T or 1, K]
