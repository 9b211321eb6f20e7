"""How dropped columns live on in kept ones (`Merge`), and the weighted sums that make it so.

Sums are taken in float32 (float64 for float64) and a few heads or channels at a time, so that no copy of a
whole cache in float32 is ever alive. On CUDA the order of the additions, and so the last bit of a sum, may
differ from run to run, unless ``torch.use_deterministic_algorithms(True)`` is set.
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
    """How dropped columns live on in kept ones: each entry becomes a weighted sum of its members.

    Args:
        into: int64 ``[B, H or 1, S]``, position among the kept entries of the one that takes column s; -1
            where a column is dropped outright. A kept column goes into its own entry.
        weights: float32 or float64, same shape: the column's weight in the sum of its entry.
        renormalize_keys: Whether merged keys get the length back that their members have on (weighted)
            average. Keys that point in different directions would otherwise become shorter by merging.
        size_bias: Whether the logarithm of its number of members is added to the logits of an entry when
            decoding, so that it draws as much attention as that many tokens.
        carried: Bias ``[B, H or 1, K]`` that entries of earlier images have already. It stands in what a run
            reports; a policy leaves it out.
    """

    into: Tensor
    weights: Tensor
    renormalize_keys: bool = False
    size_bias: bool = False
    carried: Tensor | None = None

    def members(self, entries: int) -> Tensor:
        """Number of columns that go into each of ``entries`` entries, int64 ``[B, H or 1, K]``."""
        slots = torch.where(self.into < 0, entries, self.into)
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
        """Whether another merge says the same, to the last bit."""
        if other is None or (self.carried is None) != (other.carried is None):
            return False
        flags = self.renormalize_keys == other.renormalize_keys and self.size_bias == other.size_bias
        carried = self.carried is None or other.carried is None or torch.equal(self.carried, other.carried)
        same = torch.equal(self.into, other.into) and torch.equal(self.weights, other.weights)
        return flags and carried and same


def merge_heads(tensor: Tensor, merge: Merge, entries: int, *, renormalize: bool = False) -> Tensor:
    """Merge what heads hold, ``[R, H, S, D]`` to ``[R, H, K, D]`` in the same dtype.

    Args:
        tensor: Keys or values.
        merge: Over their S entries, for R rows.
        entries: Number of entries K afterwards.
        renormalize: Whether sums get the mean length of their members.
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
    """Merge features, ``[B, S, C]`` to ``[B, K, C]`` in the same dtype; gradients reach them.

    Args:
        features: What enters the projections to keys and values.
        into: int64 ``[B, S]``, as in `Merge`.
        weights: ``[B, S]``, likewise.
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
    """Weighted sums of tokens ``[N, S, D]`` by entry, ``[N, K, D]`` in float32 or float64."""
    dtype = accumulation_dtype(tokens)
    weighted = tokens.to(dtype) * weights[..., None].to(tokens.device, dtype)
    # What is dropped outright goes into an entry of its own, which goes: times zero, infinity would stay.
    slots = torch.where(into < 0, entries, into).to(tokens.device)[..., None].expand_as(weighted)
    sums = weighted.new_zeros(tokens.shape[0], entries + 1, tokens.shape[-1])
    return sums.scatter_add(-2, slots, weighted)[:, :entries]


def _stretch(tokens: Tensor, into: Tensor, weights: Tensor, sums: Tensor) -> Tensor:
    """Factor that gives each sum the weighted mean length of its members, ``[N, K, 1]``."""
    lengths = torch.linalg.vector_norm(tokens.to(sums.dtype), dim=-1, keepdim=True)
    shares = weights.abs()
    entries = sums.shape[-2]
    total = _sums(torch.ones_like(lengths), into, shares, entries)
    wanted = _sums(lengths, into, shares, entries) / total
    factor = wanted / torch.linalg.vector_norm(sums, dim=-1, keepdim=True)
    return torch.where(factor.isfinite(), factor, 1.0)  # a sum of no length, or of no weight, stays
