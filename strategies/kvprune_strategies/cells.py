"""Cells of k x k patches or k frames, within one tile: what `quecc` makes one token of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvprune import FeatureView, Selection


@dataclass(frozen=True)
class Cells:
    """Which columns each new token stands for.

    Axes: B samples, N tokens (padded to the largest sample), P places in a cell, S columns.

    Attributes:
        members: int64 ``[B, N, P]``, the columns of each cell in reading order; 0 where there is none.
        there: bool ``[B, N, P]``, where there is one.
        pooled: bool ``[B, N]``, false for columns that stand for themselves: class tokens, and columns
            without a position.
        where: int64 ``[P]``, the place of each of P in a k x k square.
        places: The first column of each token, ``[B, 1, N]``.
    """

    members: Tensor
    there: Tensor
    pooled: Tensor
    where: Tensor
    places: Selection


def cells_of(view: FeatureView, side: int) -> Cells:
    """Return the cells of all columns that some text row sees.

    Tiles are cut from their upper left corner, so cells at the right and lower edge may be smaller. A cell
    never reaches into another tile. On a line, a cell is ``side`` columns that follow each other.

    Args:
        view: The view.
        side: Patches along the side of a cell, k.

    Raises:
        UnsupportedModelError: If nobody knows where the columns lie.
    """
    seen, places, segments = view.strata >= 0, view.places, view.segments  # [B, S], [1|B, S, 2], [1|B, S]
    batch = len(seen)
    # Samples of one kind of picture are cut alike, and once; looking costs one transfer to the host.
    alike = [(one == one[:1]).all() for one in (seen, places, segments)]
    shared = bool(torch.stack(alike).all())
    rows = 1 if shared else batch
    places, segments = places.expand(batch, -1, -1), segments.expand(batch, -1)
    cut = [_of_sample(places[row], segments[row], seen[row], side) for row in range(rows)]
    most = max(len(table) for table, _ in cut)
    device = seen.device
    members = torch.full((rows, most, side * side), -1, device=device)
    pooled = torch.zeros(rows, most, dtype=torch.bool, device=device)
    first = torch.zeros(rows, most, dtype=torch.int64, device=device)
    valid = torch.zeros(rows, most, dtype=torch.bool, device=device)
    for row, (table, is_cell) in enumerate(cut):
        count = len(table)
        members[row, :count], pooled[row, :count], valid[row, :count] = table, is_cell, True
        first[row, :count] = torch.where(table < 0, view.columns, table).amin(-1)
        first[row, count:] = first[row, count - 1]  # padding repeats the last token
        members[row, count:] = members[row, count - 1]
    used = (members >= 0).flatten(0, 1).any(0)  # on a line, only the first row of each square
    members = members[:, :, used]
    each = batch if shared else -1
    return Cells(
        members.clamp(min=0).expand(each, -1, -1),
        (members >= 0).expand(each, -1, -1),
        pooled.expand(each, -1),
        used.nonzero()[:, 0],
        Selection(
            first[:, None].expand(each, -1, -1).contiguous(),
            valid[:, None].expand(each, -1, -1).contiguous(),
            view.columns,
        ),
    )


def _of_sample(places: Tensor, segments: Tensor, seen: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Return the columns of each cell of one sample, ``[N, side * side]``, -1 for none, and which are cells.

    Args:
        places: int64 ``[S, 2]``.
        segments: int64 ``[S]``.
        seen: bool ``[S]``.
        side: Patches along the side of a cell.
    """
    columns = seen.nonzero()[:, 0]  # [n]
    places, segments = places[columns], segments[columns]
    on_grid = places[:, 0] >= 0
    # The upper left corner of each tile.
    corners = places.new_full((int(segments.max()) + 1, 2), torch.iinfo(torch.int64).max)
    at = segments[:, None].expand(-1, 2)
    corners.scatter_reduce_(0, at[on_grid], places[on_grid], "amin")
    local = torch.where(on_grid[:, None], places - corners[segments], 0)  # [n, 2]
    coarse, fine = local // side, local % side
    wide = coarse.amax(0) + 1  # [2]
    cell = (segments * wide[0] + coarse[:, 0]) * wide[1] + coarse[:, 1]
    alone = cell.amax() + 1 + torch.arange(len(columns), device=cell.device)
    cell = torch.where(on_grid, cell, alone)
    names, inverse = cell.unique(return_inverse=True)
    first = torch.full_like(names, seen.numel()).scatter_reduce_(0, inverse, columns, "amin")
    order = first.argsort()
    number = torch.empty_like(order)
    number[order] = torch.arange(len(order), device=order.device)
    table = columns.new_full((len(names), side * side), -1)
    spot = torch.where(on_grid, fine[:, 0] * side + fine[:, 1], 0)
    table[number[inverse], spot] = columns
    is_cell = torch.zeros(len(names), dtype=torch.bool, device=table.device)
    is_cell[number[inverse]] = on_grid
    return table, is_cell
