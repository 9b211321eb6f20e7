"""Stores the cross-attention mask of Mllama by tile, and cuts it to the columns that each layer holds."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from kvprune.adapters.sites import Site
from kvprune.cache.contents import Contents

__all__ = ["TileMask"]


class TileMask:
    """The cross-attention masks of a forward call; layers that hold the same columns share one.

    Decode steps that see the same tiles share theirs, see `serves`.

    Args:
        rows: bool ``[B, T, U]``, which tiles each text row may attend; None if the call has no mask.
        patches: Columns per tile.
        dtype: Dtype of the additive masks.
        layers: Cross-attention layers of the model.

    Attributes:
        row_mask: ``[B, 1, T, 1]``, 0 for rows that see no tile, gates their MLP branch. None without a mask.
    """

    def __init__(self, rows: Tensor | None, patches: int, dtype: torch.dtype, layers: int) -> None:
        self.rows, self.patches, self.dtype, self.layers = rows, patches, dtype, layers
        self.row_mask: Tensor | None = None
        self._bias: Tensor | None = None  # additive mask by tile, [B, T, U]
        # (slots, bias, mask) of earlier layers. Looked up by identity, which needs no device transfer.
        self._made: list[tuple[Tensor | None, Tensor | None, Tensor]] = []
        if rows is not None:
            sees = rows.any(-1, keepdim=True)  # [B, T, 1]
            self.row_mask = sees[:, None].to(dtype)
            # In stock transformers a row that sees no tile attends to all columns; here, to all held ones.
            bias = torch.zeros(rows.shape, dtype=dtype, device=rows.device)
            self._bias = bias.masked_fill(sees & ~rows, torch.finfo(dtype).min)

    @classmethod
    def after(
        cls, latest: Self | None, rows: Tensor | None, patches: int, dtype: torch.dtype, layers: int
    ) -> Self:
        """Return the masks of a call: those of the latest decode step if they serve it, or new ones."""
        if latest is not None and latest.serves(rows, dtype):
            return latest
        return cls(rows, patches, dtype, layers)

    def serves(self, rows: Tensor | None, dtype: torch.dtype) -> bool:
        """Whether a decode step that sees these tiles, ``[B, 1, U]``, gets the same masks; asks no device.

        Then layers that still hold the same columns need no new mask. A layer whose rows have changed places
        has other slots.
        """
        mine = self.rows
        if rows is None or mine is None or rows.device.type != "cpu" or torch.compiler.is_compiling():
            return False
        same = rows.device == mine.device and rows.is_inference() == mine.is_inference()
        return same and rows.shape[1] == 1 and dtype == self.dtype and torch.equal(rows, mine)

    def over(self, contents: Contents, site: Site) -> Tensor | None:
        """Return the additive mask over held columns, ``[B, 1 or Hq, T, K]``; None if it would be all zero.

        Args:
            contents: Entries that the layer holds while it attends.
            site: Where the mask is used.
        """
        slots, valid, bias = contents.slots, contents.valid, contents.bias
        if self._bias is None and not contents.ragged and bias is None:
            return None
        for known, known_bias, mask in self._made:
            if known is slots and known_bias is bias:
                return mask
        made = self._all() if slots is None or valid is None else self._cut(slots, valid, contents)
        if bias is not None:
            made = made + bias.repeat_interleave(contents.copies, dim=0)[:, :, None].to(made)
        made = site.fit_mask(made, made.shape[2])
        self._made.append((slots, bias, made))
        del self._made[: -self.layers]  # of columns that nothing holds any more
        return made

    def _all(self) -> Tensor:
        """Return the mask over all columns."""
        assert self._bias is not None
        # Each tile's value for each of its patches: [B, 1, T, S].
        return self._bias[:, None, :, :, None].expand(-1, -1, -1, -1, self.patches).flatten(3)

    def _cut(self, slots: Tensor, valid: Tensor, contents: Contents) -> Tensor:
        """Return the mask over the columns in ``slots``."""
        copies = contents.copies
        if copies > 1:
            slots, valid = slots.repeat_interleave(copies, dim=0), valid.repeat_interleave(copies, dim=0)
        if self._bias is None:
            mask = torch.zeros(valid.shape, dtype=self.dtype, device=valid.device)[:, :, None]  # [B, H, 1, K]
        else:
            tiles = (slots // self.patches).to(self._bias.device)[:, :, None]  # [B, H, 1, K]
            by_head = self._bias[:, None].expand(-1, tiles.shape[1], -1, -1)  # [B, H, T, U]
            mask = by_head.gather(-1, tiles.expand(-1, -1, by_head.shape[2], -1))  # [B, H, T, K]
        if contents.ragged:
            mask = mask.masked_fill(~valid[:, :, None].to(mask.device), torch.finfo(self.dtype).min)
        return mask
