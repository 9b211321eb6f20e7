"""Attention from text rows to encoder tokens: its mass, its density, and sums over heads and rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor

from kvprune.tokens.precision import accumulation_dtype
from kvprune.tokens.visibility import Visibility

__all__ = ["attention_density", "attention_mass", "by_kv_head", "last_rows", "pool_heads", "row_counts"]


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
    dtype = accumulation_dtype(keys)
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
    dtype = accumulation_dtype(keys)
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
