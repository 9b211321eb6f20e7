"""`meanpool`: tokens that are means of neighbouring tokens, the training-free baseline of compressors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvprune import (
    BudgetPolicy,
    Decision,
    FeaturePolicy,
    FeatureView,
    Replacement,
    Selection,
    scoring,
)
from kvprune.errors import UnsupportedModelError

_CHANNELS = 512
"""Channels of which the mean is taken at once, so that the features are not copied to float32 as a whole."""


@dataclass(frozen=True, kw_only=True)
class MeanPool(BudgetPolicy, FeaturePolicy):
    """Replace neighbouring tokens by one new token, the mean of their features, before any layer runs.

    Each tile of a picture is cut into cells, and each cell becomes one token: f(c) = mean of f(s) over the
    patches s of cell c. A recording, or a text, is cut into runs of neighbouring columns. Class tokens, and
    other columns without a position, stay as they are. No cell reaches across tiles or images, or holds
    columns that no text row sees. Layers project the means and normalize them after that, so a key is the
    key of the mean, which is not the mean of the keys. It knows neither the question nor attention.

    With ``k``, cells are squares of k x k patches, or runs of k columns; cells at the right and lower edge of
    a tile, and at the end of a line, may be smaller. With a budget, there are exactly as many tokens as it
    says: class tokens count first, tiles share the rest in proportion to their patches, and a tile of R x C
    patches with K cells has about sqrt(K R / C) bands of whole rows, each cut into cells of whole columns,
    whose sizes differ by as little as possible. So K = 16 of 8 x 8 patches is k = 2. A budget that is too
    small for the class tokens and one cell of each tile is met by pooling all tokens of an image, class
    tokens included, in runs.

    A larger budget does not keep a superset: all cells change.

    Args:
        k: Patches along each side of a cell, or columns in a run, at least 1, in place of a budget.
    """

    k: int | None = None

    name = "meanpool"
    version = 1
    ranks_tokens = False
    budget_alternatives = ("k",)

    def choose(self, view: FeatureView) -> Decision:
        """Return the means, each in the place of the first column of its cell."""
        cells = self.cells(view)  # [B, S]
        columns = torch.arange(view.columns, device=cells.device).expand_as(cells)
        # The first column of each cell; what is in no cell goes to an extra one, which is cut off.
        spare = torch.where(cells < 0, view.columns, cells)  # [B, S]
        first = torch.full((view.batch, view.columns + 1), view.columns, device=cells.device)
        first = first.scatter_reduce(-1, spare, columns, "amin").gather(-1, spare)  # [B, S]
        kept = (first == columns) & (cells >= 0)
        places = Selection.from_mask(kept[:, None])
        if bool((kept == (cells >= 0)).all()):  # each token is a cell of its own
            return Decision(onward=places)
        tokens = places.indices.shape[-1]
        new = view.features.new_zeros(view.batch, tokens, view.features.shape[-1])  # [B, K, C]
        for sample in range(view.batch):
            members = (cells[sample] >= 0).nonzero().squeeze(1)  # [n]
            entry = (kept[sample].cumsum(0) - 1)[first[sample, members]]  # [n], position among the places
            new[sample] = _means(view.features[sample], members, entry, tokens)
        return Decision(onward=Replacement(new, places))

    def cells(self, view: FeatureView) -> Tensor:
        """Return the cell of each column, int64 ``[B, S]``, numbered within a sample; -1 for none.

        Raises:
            UnsupportedModelError: If nobody knows where columns lie, or text stands beside a picture.
        """
        places = view.places.expand(view.batch, -1, -1)  # [B, S, 2]
        if view.layout.kinds is not None:
            kinds = " and ".join(unit.many for unit in view.layout.units)
            raise UnsupportedModelError(
                f"policy {self.name!r} takes means of neighbours in one picture, recording or text, but this "
                f"encoder puts {kinds} side by side; use a policy that selects tokens, such as divprune"
            )
        strata, segments = view.strata, view.segments.expand(view.batch, -1)  # [B, S] each
        limit = None if self.k is not None else scoring.limits(self.budget, strata)  # [B, S]
        cells = torch.full_like(strata, -1)
        for sample, columns in scoring.members(strata):  # columns: [n]
            groups = _split(columns, view.groups[sample, columns])
            counts: Sequence[int | None] = [None] * len(groups)
            if limit is not None:
                counts = _shares([len(group) for group in groups], int(limit[sample, columns[0]]))
            for group, count in zip(groups, counts, strict=True):
                own = self._numbers(places[sample, group], segments[sample, group], count)
                cells[sample, group] = own + cells[sample].amax() + 1
        cells[:, 0] = torch.where((cells < 0).all(-1), 0, cells[:, 0])  # a placeholder, which is evicted
        return cells

    def _numbers(self, places: Tensor, segments: Tensor, count: int | None) -> Tensor:
        """Return the cell of each of n tokens of one image, int64 ``[n]``, from 0.

        Args:
            places: int64 ``[n, 2]``.
            segments: int64 ``[n]``, the tile of each token.
            count: Number of cells; None for cells of k x k.
        """
        alone = places[:, 0] < 0
        fixed, patches = alone.nonzero().squeeze(1), (~alone).nonzero().squeeze(1)
        tiles = _split(patches, segments[patches])
        if count is not None and count < len(fixed) + len(tiles):
            return _runs(len(places), count, places.device)
        numbers = torch.empty_like(segments)
        numbers[fixed] = torch.arange(len(fixed), device=segments.device)
        taken = len(fixed)
        counts: Sequence[int | None] = [None] * len(tiles)
        if count is not None:
            counts = _shares([len(tile) for tile in tiles], count - taken)
        for tile, own in zip(tiles, counts, strict=True):
            inside = places[tile] - places[tile].amin(0)  # [patches, 2]
            rows, across = (inside.amax(0) + 1).tolist()
            if own is None:
                assert self.k is not None
                cell = inside // self.k  # [patches, 2]
                cell = cell[:, 0] * across + cell[:, 1]
                found = cell.unique(return_inverse=True)[1]
            elif rows * across != len(tile):  # not a whole rectangle
                found = _runs(len(tile), own, tile.device)
            else:
                found = _rectangles(inside, rows, across, own)
            numbers[tile] = found + taken
            taken += int(found.amax()) + 1
        return numbers

    fidelity = "baseline"
    cost = (
        "S C additions, and a few transfers to the host for each tile; features are copied to float32 "
        "512 channels at a time; no attention weights"
    )
    deviations = """
    Average pooling is what papers on trained compressors compare with, among them QueCC (arXiv 2411.03312).
    They pool the whole picture's patches before a language model reads them, with k x k cells. Here each tile
    is pooled on its own, class tokens stay, a budget may ask for any number of cells, and the means enter the
    projections of cross-attention layers.
    """
    differs = "class tokens stay as they are; cells of unequal size meet any budget exactly"
    checked_against = "average pooling by torch (avg_pool2d and avg_pool1d), bit-identical where k divides"


def _split(columns: Tensor, numbers: Tensor) -> list[Tensor]:
    """Return columns ``[n]`` in parts of equal numbers ``[n]``, in the order of their first column."""
    present = numbers.unique().tolist()
    parts = [columns[numbers == number] for number in present]
    return sorted(parts, key=lambda part: int(part[0]))


def _shares(sizes: Sequence[int], total: int) -> list[int]:
    """Divide a total in proportion to sizes, with at least 1 and at most its size for each.

    What is left after rounding down goes to those that lack most; ties to the first.
    """
    whole = sum(sizes)
    total = min(max(total, len(sizes)), whole)
    shares = [min(max(1, total * size // whole), size) for size in sizes]
    while sum(shares) != total:
        lacks = [total * size - share * whole for size, share in zip(sizes, shares, strict=True)]
        step = 1 if sum(shares) < total else -1
        able = [n for n, share in enumerate(shares) if (share < sizes[n] if step > 0 else share > 1)]
        shares[max(able, key=lambda n: step * lacks[n])] += step
    return shares


def _runs(columns: int, count: int, device: torch.device) -> Tensor:
    """Return which of ``count`` runs of nearly equal length each column is in, int64 ``[columns]``."""
    count = min(count, columns)
    # Column c is in run i if floor(i n / count) <= c < floor((i + 1) n / count).
    return ((torch.arange(columns, device=device) + 1) * count - 1) // columns


def _rectangles(places: Tensor, rows: int, across: int, count: int) -> Tensor:
    """Return which of ``count`` cells each patch of a rectangle is in, int64 ``[rows * across]``.

    Args:
        places: int64 ``[rows * across, 2]``, row and column, from 0.
        rows: Rows of patches.
        across: Patches in a row.
        count: Number of cells, at most ``rows * across``.
    """
    bands = round((count * rows / across) ** 0.5)
    bands = min(max(bands, -(-count // across), 1), rows, count)
    band = _runs(rows, bands, places.device)[places[:, 0]]  # [n]
    before = band * count // bands  # [n], cells in the bands above
    own = (band + 1) * count // bands - before  # [n], cells in this band
    inside = ((places[:, 1] + 1) * own - 1) // across  # [n]
    cells: Tensor = before + inside
    return cells


def _means(features: Tensor, members: Tensor, entry: Tensor, tokens: int) -> Tensor:
    """Return the mean of the members of each entry, ``[K, C]``; 0 for entries without members.

    Args:
        features: ``[S, C]``.
        members: int64 ``[n]``, columns.
        entry: int64 ``[n]``, the entry of each of them.
        tokens: Number of entries K.
    """
    members, entry = members.to(features.device), entry.to(features.device)
    sizes = torch.zeros(tokens, device=entry.device).index_add(0, entry, torch.ones_like(entry).float())
    means = []
    for some in features.split(_CHANNELS, dim=-1):
        some = some[members].to(scoring.accumulation_dtype(features))  # [n, channels]
        sums = some.new_zeros(tokens, some.shape[-1]).index_add(0, entry, some)
        means.append((sums / sizes.clamp(min=1)[:, None]).to(features.dtype))
    return torch.cat(means, dim=-1)
