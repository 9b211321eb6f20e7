"""Pools: the quantized entries of a cache layer, one pool for each number of bits.

A layer with entries of several precisions holds one `Pool` per precision. This file quantizes chosen entries
into a pool, selects from pools and joins them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvprune.cache.quantization import QUANTIZED_BITS, Quantized, quantize
from kvprune.tokens.packing import pack_left

__all__ = ["Part", "Pool", "gather_entries", "join_parts", "masks_by_bits"]

_ELEMENTS_PER_CHUNK = 2**19  # 4 MiB of float64 for each intermediate tensor


@dataclass(frozen=True, eq=False)
class Pool:
    """Keys and values of the entries of one precision, ``[R, Hkv, K, D]``.

    Args:
        keys: Quantized keys.
        values: Values, quantized to the same number of bits.
    """

    keys: Quantized
    values: Quantized

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, index: Tensor, bits: int) -> Pool:
        """Quantize chosen entries.

        Args:
            keys: ``[R, Hkv, S, D]``.
            values: ``[R, Hkv, S, D]``.
            index: int64 ``[R, H or 1, K]``, the chosen entries.
            bits: 8, 4 or 2.
        """
        return cls(*(_quantize_chosen(tensor, index, bits) for tensor in (keys, values)))

    @classmethod
    def cat(cls, pools: Sequence[Pool]) -> Pool:
        """Concatenate pools of equal bits along the entries."""
        return cls(_cat([pool.keys for pool in pools]), _cat([pool.values for pool in pools]))

    @property
    def bits(self) -> int:
        """Bits per number: 8, 4 or 2."""
        return self.keys.bits

    @property
    def width(self) -> int:
        """Number of entries per row and KV head, K."""
        return self.keys.codes.shape[-2]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors that are stored."""
        return *self.keys.tensors, *self.values.tensors

    @property
    def nbytes(self) -> int:
        """Size of all stored tensors in bytes."""
        return self.keys.nbytes + self.values.nbytes

    def at(self, index: Tensor) -> Pool:
        """Return the pool of chosen entries; ``index`` is int64 ``[R, H or 1, K]``."""
        return self.map(lambda tensor: gather_entries(tensor, index))

    def map(self, move: Callable[[Tensor], Tensor]) -> Pool:
        """Apply an operation on rows or entries to all tensors."""
        return Pool(self.keys.map(move), self.values.map(move))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Pool:
        """Move to a device, and change the dtype in which entries are dequantized."""
        return Pool(self.keys.to(device, dtype), self.values.to(device, dtype))

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """Return keys and values in their original dtype."""
        return self.keys.dequantize(), self.values.dequantize()


@dataclass(frozen=True)
class Part:
    """Entries of one pool while a layer is rearranged.

    Args:
        pool: The entries.
        places: int64 ``[R, H or 1, K]``, where each entry was in the layer before.
        valid: bool, same shape; false for padding.
    """

    pool: Pool
    places: Tensor
    valid: Tensor

    @property
    def bits(self) -> int:
        """Bits per number: 8, 4 or 2."""
        return self.pool.bits


def gather_entries(tensor: Tensor, index: Tensor) -> Tensor:
    """Return the entries ``[R, Hkv, K, D]`` of ``[R, Hkv, S, D]`` at ``index``, int64 ``[R, H or 1, K]``."""
    return tensor.gather(-2, index[..., None].expand(-1, tensor.shape[1], -1, tensor.shape[-1]))


def masks_by_bits(kept: Tensor, bits: Tensor | None) -> dict[int, Tensor]:
    """Return the mask of kept entries that are to be quantized, for each precision that occurs.

    Args:
        kept: bool ``[R, H or 1, K]``.
        bits: uint8 ``[R, H or 1, K]``, the precision of each entry; None if nothing is to be quantized.
    """
    if bits is None:
        return {}
    masks = {width: kept & (bits == width) for width in QUANTIZED_BITS}
    found: list[bool] = torch.stack([mask.any() for mask in masks.values()]).tolist()
    return {width: mask for (width, mask), some in zip(masks.items(), found, strict=True) if some}


def join_parts(parts: list[Part]) -> Part:
    """Concatenate parts of equal bits, and remove the padding between them."""
    if len(parts) == 1:
        return parts[0]
    pool = Pool.cat([part.pool for part in parts])
    places, valid = torch.cat([p.places for p in parts], -1), torch.cat([p.valid for p in parts], -1)
    place, packed = pack_left(valid)
    if place.shape[-1] == valid.shape[-1]:
        return Part(pool, places, valid)
    return Part(pool.at(place), places.gather(-1, place), packed)


def _quantize_chosen(tensor: Tensor, index: Tensor, bits: int) -> Quantized:
    """Quantize chosen entries in chunks, so that they are never all copied in full precision."""
    rows, heads, _, width = tensor.shape
    step = max(1, _ELEMENTS_PER_CHUNK // (rows * heads * width))
    chunks = [quantize(gather_entries(tensor, part), bits) for part in index.split(step, dim=-1)]
    return chunks[0] if len(chunks) == 1 else _cat(chunks)


def _cat(parts: Sequence[Quantized]) -> Quantized:
    codes, low, high = (
        torch.cat(tensors, -2) for tensors in zip(*(one.tensors for one in parts), strict=True)
    )
    return replace(parts[0], codes=codes, low=low, high=high)
