"""Pure tensor mathematics that policies share: attention mass, ranks within strata, keeping the top.

Nothing here knows a model or a cache. Ties are always broken by position, so results do not depend on the
device, and nothing ever holds a [B, H, T, S] tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor

from kvprune.selection import Budget
from kvprune.visibility import Visibility

__all__ = [
    "attention_density",
    "attention_mass",
    "by_kv_head",
    "each_stratum",
    "group_counts",
    "in_keeping_order",
    "keep_top",
    "last_rows",
    "limits",
    "members",
    "pool_heads",
    "rank_within",
    "row_counts",
    "stratum_sizes",
]

_ROWS_PER_CHUNK = 64
_ELEMENTS_PER_CHUNK = 2**21  # 8 MiB of float32 attention weights alive at a time


def attention_mass(
    queries: Tensor,
    keys: Tensor,
    visibility: Visibility,
    scaling: float,
    rows: Tensor | None = None,
    *,
    null_keys: float = 0.0,
) -> Tensor:
    """Return how much attention each column receives from text rows, by query head.

    The softmax of each row runs over the columns that the row may attend, in float32 (float64 for float64
    inputs), because logits in bfloat16 change which columns rank highest. Live rows are gathered sample
    by sample, so a sample's scores do not depend on the padding that its batch happens to need.

    Args:
        queries: ``[B, Hq, T, D]`` as they enter the attention product.
        keys: ``[B, Hkv, S, D]``; Hq is a multiple of Hkv.
        visibility: Of the columns of ``keys``.
        scaling: Factor on the logits, usually D ** -0.5.
        rows: bool ``[B, T]``, rows to add up; all live rows by default. Rows that are not live never count.
        null_keys: Weigh as if each row had so many more keys of logit zero ("n-softmax").

    Returns:
        ``[B, Hq, S]``, float32 or float64. Without null keys, the sum over S is the number of rows that were
        added up.

    Cost: one product of queries and keys. Alive at a time: 64 rows of one KV head's query heads, about
    13 MiB at S = 6404 with four query heads to a KV head. One host transfer per sample.
    """
    batch, query_heads = queries.shape[:2]
    dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
    mass = torch.zeros(batch, query_heads, keys.shape[2], dtype=dtype, device=keys.device)
    for sample, heads, weights, _ in _logits(queries, keys, visibility, scaling, rows):
        # In place: the softmax must not double what is alive.
        peak = weights.amax(-1, keepdim=True)
        if null_keys:
            peak.clamp_(min=0)
        weights.sub_(peak).exp_()
        total = weights.sum(-1, keepdim=True)
        weights.div_(total + null_keys * torch.exp(-peak) if null_keys else total)
        mass[sample, heads] += weights.sum(1)
    return mass


def attention_density(
    queries: Tensor,
    keys: Tensor,
    visibility: Visibility,
    scaling: float,
    threshold: float,
    columns: Tensor | None = None,
) -> Tensor:
    """Return which fraction of attention weights is not small, by query head: 1 - sparsity.

    A weight of a live row counts if it is at least ``threshold`` times the row's largest one. Rows and
    columns that see each other are the pairs that there are; scaling a row's weights changes nothing.

    Args:
        queries: As for `attention_mass`, and so are the next three.
        keys: See there.
        visibility: See there.
        scaling: See there.
        threshold: In (0, 1].
        columns: bool ``[B, S]``, look at these only, for a row's largest weight, too; at all by default.

    Returns:
        float64 ``[B, Hq]`` in [0, 1]; 0 where there is no pair, NaN where logits are not finite.

    Cost: that of `attention_mass`.
    """
    batch, query_heads = queries.shape[:2]
    large = torch.zeros(batch, query_heads, dtype=torch.float64, device=keys.device)
    pairs = torch.zeros_like(large)
    for sample, heads, logits, seen in _logits(queries, keys, visibility, scaling):
        if columns is not None:
            seen = seen & columns[sample]
            logits.masked_fill_(~seen, -torch.inf)
        # The softmax of a row is monotone, so its weights need not be computed.
        largest = logits.amax(-1, keepdim=True)
        above = ((logits >= largest + math.log(threshold)) & seen).sum((-1, -2)).double()
        broken = (largest.isnan() | (largest == torch.inf)).any(-2).squeeze(-1)
        large[sample, heads] += above.masked_fill(broken, torch.nan)
        pairs[sample, heads] += seen.sum()
    return large / pairs.clamp(min=1)


def _logits(
    queries: Tensor, keys: Tensor, visibility: Visibility, scaling: float, rows: Tensor | None = None
) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """Yield attention logits of live rows in chunks that may be written to.

    Args:
        queries: As for `attention_mass`, and so are the others.
        keys: See there.
        visibility: See there.
        scaling: See there.
        rows: See there.

    Yields:
        The sample, a run of query heads, their logits ``[heads, rows, S]`` with -inf where a row does not
        see a column, and what it sees, bool ``[rows, S]``.
    """
    batch = len(queries)
    kv_heads, columns = keys.shape[1], keys.shape[2]
    dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
    counted = visibility.seeing if rows is None else visibility.seeing & rows
    units = visibility.units.expand(batch, -1)
    grouped = rearrange(queries, "b (h g) t d -> b h g t d", h=kv_heads)
    group = grouped.shape[2]
    for sample in range(batch):
        chosen = counted[sample].nonzero().squeeze(1)
        if len(chosen) == 0:
            continue
        heads_per_chunk = max(
            1, _ELEMENTS_PER_CHUNK // max(1, group * min(len(chosen), _ROWS_PER_CHUNK) * columns)
        )
        seen = visibility.rows[sample].expand(queries.shape[2], -1)
        for rows_now in chosen.split(_ROWS_PER_CHUNK):
            visible = seen[rows_now][:, units[sample]]  # [rows, S]
            if visibility.exists is not None:
                visible &= visibility.exists[sample]
            for first in range(0, kv_heads, heads_per_chunk):
                heads = slice(first, first + heads_per_chunk)
                packed = rearrange(grouped[sample, heads][:, :, rows_now], "h g t d -> h (g t) d")
                logits = packed.to(dtype).mul_(scaling) @ keys[sample, heads].to(dtype).mT
                logits = rearrange(logits, "h (g t) s -> (h g) t s", t=len(rows_now))
                query_heads = slice(first * group, first * group + len(logits))
                yield sample, query_heads, logits.masked_fill_(~visible, -torch.inf), visible


def rank_within(scores: Tensor, strata: Tensor, first: Tensor | None = None) -> Tensor:
    """Return the rank of each column among the columns of its stratum, 0 for the highest score.

    Args:
        scores: ``[B, H, S]``, higher is better; equal scores are ordered by position.
        strata: int64 ``[B, S]``, the set in which a column competes.
        first: bool ``[B, H, S]``, columns that rank before all others of their stratum.

    Returns:
        int64 ``[B, H, S]``. Columns of stratum -1 have ranks among themselves, which mean nothing.
    """
    # Stable sorts from the least to the most significant key: position, score, first, stratum.
    order = scores.argsort(dim=-1, descending=True, stable=True)
    if first is not None:
        order = order.gather(-1, (~first).to(torch.uint8).gather(-1, order).argsort(dim=-1, stable=True))
    by_head = strata[:, None].expand_as(scores)
    if not bool((strata == strata[:, :1]).all()):
        order = order.gather(-1, by_head.gather(-1, order).argsort(dim=-1, stable=True))
    sorted_strata = by_head.gather(-1, order)
    start = torch.searchsorted(sorted_strata, sorted_strata)
    positions = torch.arange(scores.shape[-1], device=scores.device) - start
    return torch.empty_like(order).scatter_(-1, order, positions)


def stratum_sizes(strata: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return how many columns the stratum of each column has, int64 ``[B, S]``; 0 for stratum -1.

    Args:
        strata: int64 ``[B, S]``.
        counted: bool ``[B, S]``, count only these columns.
    """
    sizes, present = _sizes(strata, counted)
    return torch.where(strata < 0, 0, sizes.gather(-1, present))


def _sizes(strata: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the size of each stratum ``[B, strata]``, and the index of each column into it."""
    counts = (strata >= 0) if counted is None else counted & (strata >= 0)
    present = strata.clamp(min=0)
    sizes = torch.zeros(strata.shape[0], int(present.max()) + 1, dtype=torch.int64, device=strata.device)
    return sizes.scatter_add_(-1, present, counts.to(torch.int64)), present


def members(strata: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield each sample's number and the columns of each of its strata, int64 ``[n]``, for greedy methods.

    Args:
        strata: int64 ``[B, S]``; columns of stratum -1 belong to none. Costs host transfers.
    """
    for sample, highest in enumerate(strata.amax(-1).tolist()):
        for stratum in range(highest + 1):
            columns = (strata[sample] == stratum).nonzero().squeeze(1)
            if len(columns):
                yield sample, columns


def limits(budget: Budget, strata: Tensor) -> Tensor:
    """Return how many columns of its stratum a budget keeps, for each column, int64 ``[B, S]``.

    Exact: each stratum's size goes through `Budget.resolve`. 0 for columns of stratum -1.
    """
    sizes, present = _sizes(strata)
    kept = torch.tensor([budget.resolve_all(row) for row in sizes.tolist()], device=strata.device)
    return torch.where(strata < 0, 0, kept.gather(-1, present))


def keep_top(scores: Tensor, strata: Tensor, limit: Tensor, visibility: Visibility) -> Tensor:
    """Keep the highest-scoring columns of each stratum, but starve no visibility group.

    The best column of each visibility group comes first (KV03, KV05); the others follow by score until the
    stratum's limit is reached. Where there are more groups than the limit allows, one of each stays. A
    sample without an eligible column keeps column 0 as a placeholder; the cache manager evicts it again.

    Args:
        scores: ``[B, H, S]``, higher is better.
        strata: int64 ``[B, S]``; columns of stratum -1 are never kept.
        limit: int64 ``[B, S]``, how many columns of the column's stratum are kept (see `limits`), or
            ``[B, H, S]`` where heads keep different numbers.
        visibility: Of the same columns.

    Returns:
        bool ``[B, H, S]``, the kept columns.
    """
    eligible = (strata >= 0)[:, None]
    rank, first = _keeping_order(scores, strata, visibility)
    kept = (rank < (limit[:, None] if limit.ndim == 2 else limit)) & eligible
    if first is not None:
        kept |= first
    kept[..., 0] |= ~eligible.any(-1)
    return kept


def in_keeping_order(scores: Tensor, strata: Tensor, visibility: Visibility) -> Tensor:
    """Return scores in the order in which `keep_top` keeps columns of one stratum, ``[B, H, S]``.

    Args:
        scores: ``[B, H, S]``.
        strata: int64 ``[B, S]``, 0 for columns that may be kept and -1 for others; these come last, as the
            lowest number.
        visibility: Of the same columns.
    """
    rank, _ = _keeping_order(scores, strata, visibility)
    others = (strata < 0)[:, None].expand_as(rank)
    # Ranks of other columns mean nothing: they are written to a place that is cut off.
    width = scores.shape[-1]
    lowest = torch.finfo(scores.dtype).min
    ordered = scores.new_full((*scores.shape[:2], width + 1), lowest)
    return ordered.scatter_(-1, rank.masked_fill(others, width), scores)[..., :width]


def group_counts(strata: Tensor, visibility: Visibility) -> Tensor:
    """Return how many columns a sample must keep, one for each visibility group, int64 ``[B]``.

    Args:
        strata: int64 ``[B, S]``; columns of stratum -1 are not counted.
        visibility: Of the same columns.

    Returns:
        At least 1 where a sample has columns that count, and 0 where it has none.
    """
    counted = strata >= 0
    groups = torch.where(counted, visibility.groups, -1)
    present = groups.new_zeros(len(groups), len(visibility.images) + 1).scatter_(-1, groups + 1, 1)
    return present[:, 1:].sum(-1).clamp(min=counted.any(-1).to(torch.int64))


def _keeping_order(scores: Tensor, strata: Tensor, visibility: Visibility) -> tuple[Tensor, Tensor | None]:
    """Return the rank by which columns of a stratum are kept, and which are the first of their groups."""
    first = None
    if visibility.has_several_groups:
        groups = torch.where(strata >= 0, visibility.groups, -1)
        first = (rank_within(scores, groups) == 0) & (groups >= 0)[:, None]
    return rank_within(scores, strata, first), first


def pool_heads(scores: Tensor) -> Tensor:
    """Average scores over heads, ``[B, H, S]`` to ``[B, 1, S]``, for selections that heads share."""
    return (scores / scores.shape[1]).sum(1, keepdim=True)  # divided first: the sum must not overflow


def by_kv_head(scores: Tensor, kv_heads: int) -> Tensor:
    """Average over the query heads that share a KV head, ``[B, Hq, S]`` to ``[B, Hkv, S]``.

    Args:
        scores: ``[B, Hq, S]``; Hq is a multiple of ``kv_heads``, and heads of one KV head are consecutive.
        kv_heads: Number of KV heads Hkv.
    """
    return rearrange(scores, "b (h g) s -> b h g s", h=kv_heads).mean(2)


def each_stratum(strata: Tensor) -> Iterator[Tensor]:
    """Yield for each stratum that some sample has which columns belong to it, bool ``[B, S]``.

    Costs one host transfer. In an interleaved chat, what decoding sees (stratum 0) comes first.
    """
    for number in strata.unique().tolist():
        if number >= 0:
            yield strata == number


def last_rows(visibility: Visibility, count: int, columns: Tensor | None = None) -> Tensor:
    """Mark the last ``count`` live rows of each sample that see something, bool ``[B, T]``.

    A sample with fewer of them has all of them marked.

    Args:
        visibility: Of the columns.
        count: Number of rows, at least 1.
        columns: bool ``[B, S]``, a row must see one of these; any column by default.
    """
    if columns is not None:
        exists = columns if visibility.exists is None else columns & visibility.exists
        visibility = replace(visibility, exists=exists)
    seeing = visibility.seeing
    from_here = seeing.flip(-1).cumsum(-1).flip(-1)
    return seeing & (from_here <= count)


def row_counts(visibility: Visibility, rows: Tensor | None = None) -> Tensor:
    """Return how many live rows may attend each column, int64 ``[B, S]``; 0 for unseen columns.

    Args:
        visibility: Of the columns.
        rows: bool ``[B, T]``, to count only these of the live rows.
    """
    counted = visibility.live if rows is None else visibility.live & rows
    by_unit = (visibility.rows & counted[..., None]).sum(1)
    return visibility.by_column(by_unit).clamp(min=0)
