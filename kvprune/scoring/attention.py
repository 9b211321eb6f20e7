"""Attention from text rows to encoder tokens: its sums over rows and heads, and its density.

All softmax weights are computed here, in chunks: `attention_logits` and `softmax_` for a few rows, and
`logit_chunks` for many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from einops import rearrange
from torch import Tensor

from kvprune.tokens.precision import accumulation_dtype
from kvprune.tokens.visibility import Visibility

__all__ = [
    "attention_density",
    "attention_logits",
    "attention_mass",
    "attention_peak",
    "by_kv_head",
    "last_rows",
    "logit_chunks",
    "pool_heads",
    "row_counts",
    "softmax_",
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

    The softmax of each row runs over the columns that the row may attend to. It is computed in float32
    (float64 for float64 inputs), because logits in bfloat16 change which columns rank highest. Each sample is
    computed on its own and without its padding rows, so its scores do not depend on the rest of the batch.

    Args:
        queries: ``[B, Hq, T, D]`` as they enter the attention product.
        keys: ``[B, Hkv, S, D]``; Hq is a multiple of Hkv.
        visibility: Visibility of the columns of ``keys``.
        scaling: Factor on the logits, usually D ** -0.5.
        rows: bool ``[B, T]``, rows to add up; by default all live rows. Rows that are not live never count.
        null_keys: Number of extra keys of logit zero that take part in each softmax ("n-softmax").

    Returns:
        ``[B, Hq, S]``, float32 or float64. Without null keys, the sum over S is the number of rows that were
        added up.

    Cost: one product of queries and keys. At most 64 rows of one KV head's query heads are in memory at a
    time, about 13 MiB at S = 6404 with four query heads per KV head. One host transfer per sample.

    Example:
        One text row sees columns 0 and 1 of three. Equal keys receive equal attention.

        >>> visibility = Visibility(
        ...     rows=torch.tensor([[[True, False]]]),
        ...     units=torch.tensor([[0, 0, 1]]),
        ...     images=torch.tensor([0, 0]),
        ...     live=torch.tensor([[True]]),
        ... )
        >>> attention_mass(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 3, 4), visibility, 0.5)
        tensor([[[0.5000, 0.5000, 0.0000]]])
    """
    batch, query_heads = queries.shape[:2]
    dtype = accumulation_dtype(keys)
    mass = torch.zeros(batch, query_heads, keys.shape[2], dtype=dtype, device=keys.device)
    for sample, heads, logits, _ in _sample_logits(queries, keys, visibility, scaling, rows):
        mass[sample, heads] += softmax_(logits, null_keys).sum(1)
    return mass


def attention_peak(
    queries: Tensor,
    keys: Tensor,
    visibility: Visibility,
    scaling: float,
    rows: Tensor | None = None,
) -> Tensor:
    """Return the largest attention weight that each column receives from any text row, by query head.

    Args:
        queries: As for `attention_mass`.
        keys: As for `attention_mass`.
        visibility: As for `attention_mass`.
        scaling: As for `attention_mass`.
        rows: bool ``[B, T]``, rows that count; by default all live rows. Rows that are not live never count.

    Returns:
        ``[B, Hq, S]`` in [0, 1], float32 or float64; 0 for columns that no row sees.

    Cost: that of `attention_mass`.

    Example:
        Two text rows see three columns. The last column gets most from the second row.

        >>> queries = torch.tensor([[[[0.0], [1.0]]]])  # [B, Hq, T, D]
        >>> keys = torch.tensor([[[[0.0], [0.0], [2.0]]]])  # [B, Hkv, S, D]
        >>> visibility = Visibility(
        ...     rows=torch.tensor([[[True]]]),
        ...     units=torch.tensor([[0, 0, 0]]),
        ...     images=torch.tensor([0]),
        ...     live=torch.tensor([[True, True]]),
        ... )
        >>> attention_peak(queries, keys, visibility, 1.0)
        tensor([[[0.3333, 0.3333, 0.7870]]])
    """
    batch, query_heads = queries.shape[:2]
    dtype = accumulation_dtype(keys)
    peak = torch.zeros(batch, query_heads, keys.shape[2], dtype=dtype, device=keys.device)
    for sample, heads, logits, _ in _sample_logits(queries, keys, visibility, scaling, rows):
        peak[sample, heads] = peak[sample, heads].maximum(softmax_(logits).amax(1))
    return peak


def attention_density(
    queries: Tensor,
    keys: Tensor,
    visibility: Visibility,
    scaling: float,
    threshold: float,
    columns: Tensor | None = None,
) -> Tensor:
    """Return the fraction of attention weights that are not small (1 - sparsity), by query head.

    A weight of a live row is not small if it is at least ``threshold`` times the largest weight of its row.
    Only weights between rows and columns that see each other count. The result depends on ratios of weights
    in a row, so scaling a row does not change it.

    Args:
        queries: As for `attention_mass`.
        keys: As for `attention_mass`.
        visibility: As for `attention_mass`.
        scaling: As for `attention_mass`.
        threshold: In (0, 1].
        columns: bool ``[B, S]``, consider only these columns, also for a row's largest weight. Default: all.

    Returns:
        float64 ``[B, Hq]`` in [0, 1]; 0 if no weight counts, NaN if logits are not finite.

    Cost: that of `attention_mass`.
    """
    batch, query_heads = queries.shape[:2]
    large = torch.zeros(batch, query_heads, dtype=torch.float64, device=keys.device)
    pairs = torch.zeros_like(large)
    for sample, heads, logits, seen in _sample_logits(queries, keys, visibility, scaling):
        if columns is not None:
            seen = seen & columns[sample]  # [rows, S]
            logits.masked_fill_(~seen, -torch.inf)
        # Ratios of weights are differences of logits, so the softmax itself is not needed.
        largest = logits.amax(-1, keepdim=True)  # [heads, rows, 1]
        above = ((logits >= largest + math.log(threshold)) & seen).sum((-1, -2)).double()  # [heads]
        broken = (largest.isnan() | (largest == torch.inf)).any(-2).squeeze(-1)  # [heads]
        large[sample, heads] += above.masked_fill(broken, torch.nan)
        pairs[sample, heads] += seen.sum()
    return large / pairs.clamp(min=1)


def attention_logits(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Return the attention logits of one sample's grouped query heads, without a mask.

    Args:
        queries: ``[Hkv, G, T, D]``, the G query heads of each KV head.
        keys: ``[Hkv, S, D]``.
        scaling: Factor on the logits.

    Returns:
        ``[Hkv, G, T, S]``, float32 (float64 for float64 keys). The tensor is new and may be written to.

    Example:
        >>> attention_logits(torch.ones(1, 2, 1, 4), torch.ones(1, 3, 4), 0.5).shape
        torch.Size([1, 2, 1, 3])
    """
    dtype = accumulation_dtype(keys)
    packed = rearrange(queries, "h g t d -> h (g t) d").to(dtype) * scaling
    return rearrange(packed @ keys.to(dtype).mT, "h (g t) s -> h g t s", t=queries.shape[2])


def softmax_(logits: Tensor, null_keys: float = 0.0) -> Tensor:
    """Replace logits by their softmax over the last axis, in place, and return them.

    Args:
        logits: Floating point ``[..., S]``; -inf for columns that take no part. Without null keys, each row
            needs a finite logit.
        null_keys: Number of extra keys of logit zero that take part in the softmax ("n-softmax").

    Example:
        >>> softmax_(torch.tensor([0.0, 0.0, -torch.inf]))
        tensor([0.5000, 0.5000, 0.0000])
        >>> softmax_(torch.tensor([0.0, 0.0, -torch.inf]), null_keys=2)
        tensor([0.2500, 0.2500, 0.0000])
    """
    # In place, so that the softmax does not double the memory.
    peak = logits.amax(-1, keepdim=True)  # [..., 1]
    if null_keys:
        peak.clamp_(min=0)  # the logit of the null keys
    logits.sub_(peak).exp_()
    total = logits.sum(-1, keepdim=True)  # [..., 1]
    return logits.div_(total + null_keys * torch.exp(-peak) if null_keys else total)


def logit_chunks(
    queries: Tensor, keys: Tensor, rows: Tensor, scaling: float, sees: Callable[[Tensor], Tensor]
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield one sample's attention logits in chunks of at most 64 rows and about 8 MiB.

    Args:
        queries: ``[Hq, T, D]``.
        keys: ``[Hkv, S, D]``; Hq is a multiple of Hkv.
        rows: int64 ``[n]``, the rows that are computed.
        scaling: Factor on the logits.
        sees: Takes some of the rows, int64 ``[m]``, and returns which columns they may attend to, bool
            ``[m, S]``.

    Yields:
        A slice of query heads; their logits ``[heads, m, S]`` with -inf where a row may not attend to a
        column, which may be written to; and what the rows see, bool ``[m, S]``.
    """
    kv_heads, columns = keys.shape[:2]
    grouped = rearrange(queries, "(h g) t d -> h g t d", h=kv_heads)
    group = grouped.shape[1]
    rows_per_chunk = min(len(rows), _ROWS_PER_CHUNK)
    heads_per_chunk = max(1, _ELEMENTS_PER_CHUNK // max(1, group * rows_per_chunk * columns))
    for rows_now in rows.split(_ROWS_PER_CHUNK):
        seen = sees(rows_now)
        for first in range(0, kv_heads, heads_per_chunk):
            heads = slice(first, first + heads_per_chunk)  # KV heads
            logits = attention_logits(grouped[heads][:, :, rows_now], keys[heads], scaling).flatten(0, 1)
            query_heads = slice(first * group, first * group + len(logits))
            yield query_heads, logits.masked_fill_(~seen, -torch.inf), seen


def _sample_logits(
    queries: Tensor, keys: Tensor, visibility: Visibility, scaling: float, rows: Tensor | None = None
) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """Yield the sample and the `logit_chunks` of its live rows; arguments as for `attention_mass`."""
    batch, text_rows = len(queries), queries.shape[2]
    counted = visibility.seeing if rows is None else visibility.seeing & rows  # [B, T]
    units = visibility.units.expand(batch, -1)  # [B, S]

    def sees(sample: int, some: Tensor) -> Tensor:
        seen = visibility.rows[sample].expand(text_rows, -1)[some][:, units[sample]]  # [rows, S]
        return seen if visibility.exists is None else seen & visibility.exists[sample]

    for sample in range(batch):
        chosen = counted[sample].nonzero().squeeze(1)
        if len(chosen):
            chunks = logit_chunks(queries[sample], keys[sample], chosen, scaling, partial(sees, sample))
            for heads, logits, seen in chunks:
                yield sample, heads, logits, seen


def pool_heads(scores: Tensor) -> Tensor:
    """Average scores over heads, ``[B, H, S]`` to ``[B, 1, S]``, for selections that heads share.

    Example:
        >>> pool_heads(torch.tensor([[[1.0, 5.0], [3.0, 1.0]]]))
        tensor([[[2., 3.]]])
    """
    return (scores / scores.shape[1]).sum(1, keepdim=True)  # divided first, so that the sum cannot overflow


def by_kv_head(scores: Tensor, kv_heads: int) -> Tensor:
    """Average over the query heads that share a KV head, ``[B, Hq, S]`` to ``[B, Hkv, S]``.

    Args:
        scores: ``[B, Hq, S]``; Hq is a multiple of ``kv_heads``, and heads of one KV head are consecutive.
        kv_heads: Number of KV heads Hkv.

    Example:
        >>> by_kv_head(torch.tensor([[[1.0], [3.0], [5.0], [9.0]]]), 2)
        tensor([[[2.],
                 [7.]]])
    """
    return rearrange(scores, "b (h g) s -> b h g s", h=kv_heads).mean(2)


def last_rows(visibility: Visibility, count: int, columns: Tensor | None = None) -> Tensor:
    """Mark the last ``count`` live rows of each sample that see at least one column, bool ``[B, T]``.

    If a sample has fewer such rows, all of them are marked.

    Args:
        visibility: Visibility of the columns.
        count: Number of rows, at least 1.
        columns: bool ``[B, S]``, count only rows that see one of these columns; by default any column.

    Example:
        >>> visibility = Visibility(
        ...     rows=torch.tensor([[[True]]]),
        ...     units=torch.tensor([[0, 0]]),
        ...     images=torch.tensor([0]),
        ...     live=torch.tensor([[False, True, True, True]]),
        ... )
        >>> last_rows(visibility, 2)
        tensor([[False, False,  True,  True]])
    """
    if columns is not None:
        exists = columns if visibility.exists is None else columns & visibility.exists
        visibility = replace(visibility, exists=exists)
    seeing = visibility.seeing  # [B, T]
    from_here = seeing.flip(-1).cumsum(-1).flip(-1)  # [B, T], how many of them are at or after each row
    return seeing & (from_here <= count)


def row_counts(visibility: Visibility, rows: Tensor | None = None) -> Tensor:
    """Return how many live rows may attend to each column, int64 ``[B, S]``; 0 for unseen columns.

    Args:
        visibility: Visibility of the columns.
        rows: bool ``[B, T]``, count only these of the live rows.

    Example:
        >>> visibility = Visibility(
        ...     rows=torch.tensor([[[True, False], [True, True]]]),
        ...     units=torch.tensor([[0, 0, 1]]),
        ...     images=torch.tensor([0, 1]),
        ...     live=torch.tensor([[True, True]]),
        ... )
        >>> row_counts(visibility)
        tensor([[2, 2, 1]])
    """
    counted = visibility.live if rows is None else visibility.live & rows
    by_unit = (visibility.rows & counted[..., None]).sum(1)  # [B, U]
    return visibility.by_column(by_unit).clamp(min=0)
