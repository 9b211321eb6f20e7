"""Quantizes vectors to 8, 4 or 2 bits a number, and packs them into bytes.

Each vector is quantized on its own, in groups of neighbouring channels: no number of one token depends on
another token, so neither the order of tokens nor the batch matters (KV09, KV10). A group stores its lowest
and highest number, and every number as the nearest of ``2 ** bits`` evenly spaced levels from one to the
other:

    step = (high - low) / (2 ** bits - 1)
    code = round((x - low) / step)          halves to even
    x'   = low + code * step

The two ends are numbers of the group, so they are stored exactly in the tensor's own dtype; usual formats
store a rounded scale and zero point instead, which take as many bytes. Hence the bound, for every number:

    abs(x - x') <= step / 2 + eps * max(abs(low), abs(high))

where eps is that of the own dtype: x' is computed in float32 (float64 for float64) and then rounded to it.

Why not a library: those for weights or caches (torchao, quanto, hqq, the quantized cache of transformers)
quantize whole tensors at one precision. Here precision differs by token within a row, rows are ragged, and
the codes must move along with beams and be appended to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvprune.errors import QuantizationError
from kvprune.tokens.precision import accumulation_dtype

__all__ = ["QUANTIZED_BITS", "Pool", "Quantized", "group_width", "pack", "quantize", "unpack"]

QUANTIZED_BITS = (8, 4, 2)

_MOST_CHANNELS = 64
_LEAST_CHANNELS = 16
_ELEMENTS_PER_CHUNK = 2**19  # 4 MiB of float64 at a time, a few times over


def group_width(width: int) -> int:
    """Return how many channels of a vector of ``width`` share their ends.

    The largest divisor up to 64. Where that is below 16 the ends would weigh more than the codes, so the
    whole vector is one group.
    """
    divisor = max(size for size in range(1, min(width, _MOST_CHANNELS) + 1) if width % size == 0)
    return divisor if divisor >= _LEAST_CHANNELS else width


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes below ``2 ** bits`` along the last axis, uint8.

    ``[..., D]`` becomes ``[..., ceil(D * bits / 8)]``; the first code lies in the lowest bits of its byte.
    """
    per_byte = 8 // bits
    if per_byte == 1:
        return codes
    missing = -codes.shape[-1] % per_byte
    if missing:
        codes = torch.nn.functional.pad(codes, (0, missing))
    packed = codes[..., ::per_byte].clone()
    for place in range(1, per_byte):
        packed |= codes[..., place::per_byte] << (bits * place)
    return packed


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """Undo `pack`; ``width`` is D."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = (packed[..., None] >> shifts) & (2**bits - 1)
    unpacked: Tensor = codes.flatten(-2)[..., :width]
    return unpacked


@dataclass(frozen=True, eq=False)
class Quantized:
    """Quantized vectors ``[..., D]``.

    Args:
        codes: uint8 ``[..., ceil(D * bits / 8)]``, packed.
        low: ``[..., groups]``, the lowest number of each group, in the dtype that the vectors had.
        high: Likewise, the highest.
        bits: 8, 4 or 2.
        width: D.
    """

    codes: Tensor
    low: Tensor
    high: Tensor
    bits: int
    width: int

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All that is stored."""
        return self.codes, self.low, self.high

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def steps(self) -> Tensor:
        """Distance of neighbouring levels, ``[..., groups]``; half of it bounds the error."""
        exact = accumulation_dtype(self.low.dtype)
        steps: Tensor = (self.high.to(exact) - self.low.to(exact)) / (2**self.bits - 1)
        return steps

    def map(self, move: Callable[[Tensor], Tensor]) -> Quantized:
        """Return the same after an operation that leaves the last axis alone."""
        codes, low, high = (move(tensor) for tensor in self.tensors)
        return replace(self, codes=codes, low=low, high=high)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Quantized:
        """Return the same on a device, and with ends of a dtype; codes stay what they are."""
        moved = self if device is None else self.map(lambda tensor: tensor.to(device))
        return moved if dtype is None else replace(moved, low=moved.low.to(dtype), high=moved.high.to(dtype))

    def dequantize(self) -> Tensor:
        """Return the vectors ``[..., D]`` in the dtype that they had; waits for no device."""
        groups = self.low.shape[-1]
        steps = self.steps[..., None]
        codes = unpack(self.codes, self.bits, self.width).unflatten(-1, (groups, -1)).to(steps.dtype)
        # In float32 for 16-bit dtypes: their own products would be off by more than a step of 8 bits.
        levels = codes.mul_(steps).add_(self.low[..., None].to(steps.dtype))
        vectors: Tensor = levels.flatten(-2).to(self.low.dtype)
        return vectors


def quantize(vectors: Tensor, bits: int) -> Quantized:
    """Quantize vectors ``[..., D]``, each on its own.

    Args:
        vectors: Of a floating-point dtype.
        bits: 8, 4 or 2.

    Raises:
        QuantizationError: If the bits are others, or a number is not finite or too far from another one for
            their difference to be.
    """
    if bits not in QUANTIZED_BITS:
        raise QuantizationError(f"vectors are quantized to 8, 4 or 2 bits, got {bits!r}")
    if not vectors.is_floating_point() or vectors.shape[-1] < 1:
        raise QuantizationError(
            "what is quantized are vectors [..., D] of a floating-point dtype with D of at least 1, "
            f"got {vectors.dtype} {list(vectors.shape)}"
        )
    width = vectors.shape[-1]
    grouped = vectors.unflatten(-1, (-1, group_width(width)))
    low, high = grouped.amin(-1), grouped.amax(-1)
    # In float64, so that every machine rounds alike; without it (MPS) in float32.
    exact = torch.float32 if vectors.device.type == "mps" else torch.float64
    reach = high.to(exact) - low.to(exact)
    most = torch.finfo(accumulation_dtype(vectors.dtype)).max / 2
    if not bool((reach <= most).all()):  # NaN compares false
        raise QuantizationError(
            f"keys or values from {float(vectors.min()):g} to {float(vectors.max()):g} ({vectors.dtype}) "
            f"cannot be quantized: they must be finite and lie within {most:g} of each other"
        )
    steps = (reach / (2**bits - 1))[..., None]
    codes = (grouped.to(exact) - low[..., None].to(exact)).div_(torch.where(steps > 0, steps, 1.0))
    codes = codes.round_().clamp_(0, 2**bits - 1).to(torch.uint8).flatten(-2)
    return Quantized(pack(codes, bits), low, high, bits, width)


@dataclass(frozen=True, eq=False)
class Pool:
    """Keys and values of entries of one precision, ``[R, Hkv, K, D]``.

    Args:
        keys: Quantized.
        values: Quantized to the same bits.
    """

    keys: Quantized
    values: Quantized

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, index: Tensor, bits: int) -> Pool:
        """Quantize chosen entries.

        Args:
            keys: ``[R, Hkv, S, D]``.
            values: Likewise.
            index: int64 ``[R, H or 1, K]``, which entries.
            bits: 8, 4 or 2.
        """
        return cls(*(_quantize_chosen(tensor, index, bits) for tensor in (keys, values)))

    @classmethod
    def cat(cls, pools: Sequence[Pool]) -> Pool:
        """Join pools of equal bits along the entries."""
        return cls(_cat([pool.keys for pool in pools]), _cat([pool.values for pool in pools]))

    @property
    def bits(self) -> int:
        """8, 4 or 2."""
        return self.keys.bits

    @property
    def width(self) -> int:
        """Entries per row and KV head, K."""
        return self.keys.codes.shape[-2]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is stored."""
        return *self.keys.tensors, *self.values.tensors

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored: codes and ends."""
        return self.keys.nbytes + self.values.nbytes

    def at(self, index: Tensor) -> Pool:
        """Return chosen entries, ``index`` being int64 ``[R, H or 1, K]``."""
        return self.map(lambda tensor: gather_entries(tensor, index))

    def map(self, move: Callable[[Tensor], Tensor]) -> Pool:
        """Return the same after an operation on rows or entries."""
        return Pool(self.keys.map(move), self.values.map(move))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Pool:
        """Return the same on a device and with ends of a dtype."""
        return Pool(self.keys.to(device, dtype), self.values.to(device, dtype))

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """Return keys and values in the dtype that they had."""
        return self.keys.dequantize(), self.values.dequantize()


def gather_entries(tensor: Tensor, index: Tensor) -> Tensor:
    """Return chosen entries of ``[R, Hkv, S, D]``, ``index`` being int64 ``[R, H or 1, K]``."""
    return tensor.gather(-2, index[..., None].expand(-1, tensor.shape[1], -1, tensor.shape[-1]))


def _quantize_chosen(tensor: Tensor, index: Tensor, bits: int) -> Quantized:
    """Quantize chosen entries, a few at a time: what they become is all that is ever held beside them."""
    rows, heads, _, width = tensor.shape
    step = max(1, _ELEMENTS_PER_CHUNK // (rows * heads * width))
    chunks = [quantize(gather_entries(tensor, part), bits) for part in index.split(step, dim=-1)]
    return chunks[0] if len(chunks) == 1 else _cat(chunks)


def _cat(parts: Sequence[Quantized]) -> Quantized:
    codes, low, high = (
        torch.cat(tensors, -2) for tensors in zip(*(one.tensors for one in parts), strict=True)
    )
    return replace(parts[0], codes=codes, low=low, high=high)
