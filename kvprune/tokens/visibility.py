"""Which encoder columns each text row may attend to, stored by unit and never as a [B, T, S] tensor.

A *unit* is a set of columns that the model's mask treats alike (a tile in Mllama; "real" and "padding" in
an encoder-decoder model). All questions about visibility are answered here: which columns prefill can see,
which ones decoding can see, and which columns form a group of which at least one must be kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from einops import rearrange
from torch import Tensor

__all__ = ["Visibility", "with_last_row"]


@dataclass(frozen=True, eq=False)
class Visibility:
    """Which units each text row sees, and the unit of each column.

    Args:
        rows: bool ``[B, T, U]``, or ``[B, 1, U]`` if all text rows see the same: whether row t may attend to
            the columns of unit u. In stock transformers, a row that sees no unit attends to everything.
        units: int64 ``[B or 1, S]``, the unit of each column.
        images: int64 ``[U]``, the image of each unit.
        live: bool ``[B, T]``, live rows: not padding, and at least one visible unit.
        exists: bool ``[B, S]``, false for columns that pad a ragged batch; None if there is no padding.

    Example:
        >>> visibility = Visibility(  # one image; its second tile (columns 2 and 3) is padding
        ...     rows=torch.tensor([[[True, False]]]),
        ...     units=torch.tensor([[0, 0, 1, 1]]),
        ...     images=torch.tensor([0, 0]),
        ...     live=torch.tensor([[True]]),
        ... )
        >>> visibility.decode.tolist()
        [[True, True, False, False]]
    """

    rows: Tensor
    units: Tensor
    images: Tensor
    live: Tensor
    exists: Tensor | None = None

    @property
    def batch(self) -> int:
        """Number of samples B, as the model saw them."""
        return self.rows.shape[0]

    @property
    def columns(self) -> int:
        """Number of columns S."""
        return self.units.shape[-1]

    @cached_property
    def prefill(self) -> Tensor:
        """Columns that at least one live row may attend to, bool ``[B, S]``."""
        return self.by_column(self._live_rows.any(1))

    @cached_property
    def decode(self) -> Tensor:
        """Columns that the last live row may attend to, bool ``[B, S]``. Budgets count these."""
        return self.by_column(self._last_live_row)

    @cached_property
    def decode_units(self) -> Tensor:
        """Units that decoding attends to in stock transformers, bool ``[B, U]``.

        Decoding repeats the mask of the last row. If that row sees nothing (a sample without an image), stock
        transformers attends to everything, so dropping anything would change decoding.
        """
        last_row = self.rows[:, -1]
        return last_row | self._last_live_row | ~last_row.any(-1, keepdim=True)

    @cached_property
    def groups(self) -> Tensor:
        """Visibility group of each column, int64 ``[B, S]``; -1 if no live row may attend to it.

        The columns of a group belong to one image and are seen by exactly the same live rows. If one column
        of each group is kept, every live row still has a token to attend to (KV03, KV05).
        """
        pattern = rearrange(self._live_rows, "b t u -> b u t")  # the rows that see each unit
        alike = (pattern[:, :, None] == pattern[:, None]).all(-1) & (self.images[:, None] == self.images)
        first_alike = alike.to(torch.uint8).argmax(-1)  # [B, U], the first unit of the same group
        group = torch.where(pattern.any(-1), first_alike, -1)
        return torch.where(self.prefill, self.by_column(group), -1)

    @cached_property
    def has_several_groups(self) -> bool:
        """Whether some sample has more than one visibility group (one host transfer)."""
        groups = self.groups
        highest = groups.amax(-1)
        lowest = torch.where(groups < 0, highest[:, None], groups).amin(-1)
        return bool((lowest != highest).any())

    @cached_property
    def strata(self) -> Tensor:
        """Stratum of each column, int64 ``[B, S]``: a budget is counted within each stratum.

        Stratum 0 holds the columns that decoding can see. Columns that only prefill can see (earlier images
        of an interleaved chat) form one stratum for each visibility group, numbered from 1. Columns that no
        row sees are in stratum -1. If no live row sees any column, all columns are in stratum 0: stock
        transformers lets the rows of a sample without an image attend to everything.
        """
        blind = ~self.prefill.any(-1, keepdim=True)
        if self.exists is not None:
            blind = blind & self.exists
        seen_early = torch.where(self.groups < 0, -1, self.groups + 1)
        return torch.where(self.decode | blind, 0, seen_early)

    @cached_property
    def decode_strata(self) -> Tensor:
        """Stratum 0 alone, int64 ``[B, S]``: 0 for columns that decoding can see, -1 for all others."""
        return torch.where(self.strata == 0, 0, -1)

    def by_column(self, by_unit: Tensor) -> Tensor:
        """Give each column the value of its unit, ``[B, U]`` to ``[B, S]``; false or -1 for padding."""
        spread = by_unit.gather(-1, self.units.expand(self.batch, -1))
        if self.exists is None:
            return spread
        return torch.where(self.exists, spread, False if spread.dtype == torch.bool else -1)

    def from_column(self, first: int) -> Visibility:
        """Return the visibility of the columns from ``first`` on (those of a new image)."""
        if first == 0:
            return self
        exists = None if self.exists is None else self.exists[:, first:]
        return replace(self, units=self.units[:, first:], exists=exists)

    def at(self, indices: Tensor, valid: Tensor) -> Visibility:
        """Return the visibility of chosen columns.

        Args:
            indices: int64 ``[B, K]``.
            valid: bool ``[B, K]``, false for padding.
        """
        exists = valid if self.exists is None else valid & self.exists.gather(-1, indices)
        return replace(self, units=self.units.expand(self.batch, -1).gather(-1, indices), exists=exists)

    @cached_property
    def seeing(self) -> Tensor:
        """Live rows that see at least one of these columns, bool ``[B, T]``.

        Among the columns of one image only (see `from_column`), some live rows may see none.
        """
        units = self.units.expand(self.batch, -1)  # [B, S]
        counted = torch.ones_like(units) if self.exists is None else self.exists.to(units.dtype)
        present = torch.zeros_like(self.rows[:, 0], dtype=units.dtype).scatter_add(-1, units, counted) > 0
        return self.live & (self.rows & present[:, None]).any(-1)

    @cached_property
    def _live_rows(self) -> Tensor:
        """Which units each row sees, bool ``[B, T or 1, U]``; nothing for rows that are not live."""
        counted = self.live.any(1, keepdim=True) if self.rows.shape[1] == 1 else self.live
        return self.rows & counted[..., None]

    @cached_property
    def _last_live_row(self) -> Tensor:
        """Units that the last live row sees, bool ``[B, U]``; none if no row is live."""
        seen = self._live_rows
        if seen.shape[1] == 1:
            return seen[:, 0]
        last = self.live.shape[1] - 1 - self.live.flip(1).to(torch.uint8).argmax(1)
        return seen.gather(1, last[:, None, None].expand(-1, 1, seen.shape[-1]))[:, 0]


def with_last_row(live: Tensor, sees: Tensor) -> Tensor:
    """Let the last row of a sample that is nothing but padding count, so that something is kept for it.

    Args:
        live: bool ``[B, T]``, rows that are no padding and see something.
        sees: bool ``[B, T]``, rows that see something.
    """
    empty = ~live.any(-1)  # [B]
    last = torch.arange(live.shape[1], device=live.device) == live.shape[1] - 1
    return live | (empty[:, None] & last & sees)
