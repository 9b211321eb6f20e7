"""Merges dropped columns into kept ones: the assignment with weights (`Merge`), and the weighted sums.

Sums are computed in float32 (float64 for float64 models), a few heads or channels at a time, so that a whole
cache is never copied to float32. On CUDA the order of the additions, and so the last bit of a sum, may differ
from run to run, unless ``torch.use_deterministic_algorithms(True)`` is set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvprune.tokens.precision import accumulation_dtype

__all__ = ["Merge", "merge_features", "merge_heads"]

_ELEMENTS_PER_CHUNK = 2**21  # 8 MiB of float32


@dataclass(frozen=True, eq=False)
class Merge:
    """Assigns columns to kept entries: each entry becomes a weighted sum of its members.

    Args:
        into: int64 ``[B, H or 1, S]``, the kept entry that column s is added to, as a position among the kept
            entries; -1 if the column is dropped without a trace. A kept column goes into its own entry.
        weights: float32 or float64, same shape: the column's weight in the sum of its entry.
        renormalize_keys: Whether to scale each merged key to the weighted mean length of its members. Without
            it, merging keys that point in different directions makes them shorter.
        size_bias: Whether decoding adds the logarithm of an entry's number of members to its logits, so that
            it receives as much attention as that many tokens.
        carried: Bias ``[B, H or 1, K]`` that entries of earlier images already have. It appears only in the
            selections that a run reports; policies leave it out.
    """

    into: Tensor
    weights: Tensor
    renormalize_keys: bool = False
    size_bias: bool = False
    carried: Tensor | None = None

    def members(self, entries: int) -> Tensor:
        """Return the number of members of each of ``entries`` entries, int64 ``[B, H or 1, K]``."""
        # Dropped columns are counted in an extra entry, which is cut off.
        slots = torch.where(self.into < 0, entries, self.into)  # [B, H or 1, S]
        counts = torch.zeros(*slots.shape[:2], entries + 1, dtype=torch.int64, device=slots.device)
        return counts.scatter_add_(-1, slots, torch.ones_like(slots))[..., :entries]

    def repeat(self, copies: int) -> Merge:
        """Return the merge with each row of its batch repeated."""
        return self._over_rows(lambda tensor: tensor.repeat_interleave(copies, dim=0))

    def every(self, step: int) -> Merge:
        """Return the merge of every ``step``-th row of its batch."""
        return self._over_rows(lambda tensor: tensor[::step])

    def _over_rows(self, move: Callable[[Tensor], Tensor]) -> Merge:
        carried = None if self.carried is None else move(self.carried)
        return replace(self, into=move(self.into), weights=move(self.weights), carried=carried)

    def equals(self, other: Merge | None) -> bool:
        """Whether another merge has the same assignment, weights and flags, to the last bit."""
        if other is None or (self.carried is None) != (other.carried is None):
            return False
        flags = self.renormalize_keys == other.renormalize_keys and self.size_bias == other.size_bias
        carried = self.carried is None or other.carried is None or torch.equal(self.carried, other.carried)
        same = torch.equal(self.into, other.into) and torch.equal(self.weights, other.weights)
        return flags and carried and same


def merge_heads(tensor: Tensor, merge: Merge, entries: int, *, renormalize: bool = False) -> Tensor:
    """Merge keys or values, ``[R, H, S, D]`` to ``[R, H, K, D]`` in the same dtype.

    Args:
        tensor: Keys or values.
        merge: The merge of their S entries, for R rows.
        entries: Number of entries K afterwards.
        renormalize: Whether sums are scaled to the weighted mean length of their members.
    """
    rows, heads, columns, width = tensor.shape
    merged = tensor.new_empty(rows, heads, entries, width)
    into, weights = (part.expand(rows, heads, columns) for part in (merge.into, merge.weights))
    heads_per_chunk = max(1, _ELEMENTS_PER_CHUNK // max(1, columns * width))
    for row in range(rows):
        for first in range(0, heads, heads_per_chunk):
            some = slice(first, first + heads_per_chunk)
            sums = _sums(tensor[row, some], into[row, some], weights[row, some], entries)
            if renormalize:
                sums *= _stretch(tensor[row, some], into[row, some], weights[row, some], sums)
            merged[row, some] = sums
    return merged


def merge_features(features: Tensor, into: Tensor, weights: Tensor, entries: int) -> Tensor:
    """Merge features, ``[B, S, C]`` to ``[B, K, C]`` in the same dtype, differentiably.

    Args:
        features: Inputs of the projections to keys and values.
        into: int64 ``[B, S]``, as in `Merge`.
        weights: ``[B, S]``, as in `Merge`.
        entries: Number of entries K afterwards.
    """
    batch, columns, channels = features.shape
    channels_per_chunk = max(1, min(channels, _ELEMENTS_PER_CHUNK // max(1, batch * columns)))
    sums = [
        _sums(some, into, weights, entries).to(features.dtype)
        for some in features.split(channels_per_chunk, dim=-1)
    ]
    return torch.cat(sums, dim=-1)


def _sums(tokens: Tensor, into: Tensor, weights: Tensor, entries: int) -> Tensor:
    """Return the weighted sum of the tokens of each entry, ``[N, S, D]`` to ``[N, K, D]``."""
    dtype = accumulation_dtype(tokens)
    weighted = tokens.to(dtype) * weights[..., None].to(tokens.device, dtype)  # [N, S, D]
    # Dropped columns are added to an extra entry, which is cut off. A weight of 0 would turn inf into NaN.
    slots = torch.where(into < 0, entries, into).to(tokens.device)[..., None].expand_as(weighted)
    sums = weighted.new_zeros(tokens.shape[0], entries + 1, tokens.shape[-1])  # [N, K + 1, D]
    return sums.scatter_add(-2, slots, weighted)[:, :entries]


def _stretch(tokens: Tensor, into: Tensor, weights: Tensor, sums: Tensor) -> Tensor:
    """Return the factors that scale sums to the weighted mean length of their members, ``[N, K, 1]``."""
    lengths = torch.linalg.vector_norm(tokens.to(sums.dtype), dim=-1, keepdim=True)  # [N, S, 1]
    shares = weights.abs()
    entries = sums.shape[-2]
    total = _sums(torch.ones_like(lengths), into, shares, entries)  # [N, K, 1]
    wanted = _sums(lengths, into, shares, entries) / total
    factor = wanted / torch.linalg.vector_norm(sums, dim=-1, keepdim=True)
    return torch.where(factor.isfinite(), factor, 1.0)  # sums of length or weight 0 stay as they are
