"""Quantizes vectors to 8, 4 or 2 bits per number, and packs the codes into bytes.

Each vector is quantized on its own, in groups of neighbouring channels. No code depends on another token, so
the order of tokens and the rest of the batch do not matter (KV09, KV10). A group stores its lowest and its
highest number exactly. Every number is stored as the nearest of ``2 ** bits`` evenly spaced levels between
these two:

    step = (high - low) / (2 ** bits - 1)
    code = round((x - low) / step)          halves to even
    x'   = low + code * step

The lowest and highest number are stored in the tensor's own dtype, without rounding. (Common formats store a
rounded scale and zero point instead, in as many bytes.) So the error of every number is bounded:

    abs(x - x') <= step / 2 + eps * max(abs(low), abs(high))

where eps is the machine epsilon of that dtype: x' is computed in float32 (float64 for float64) and then
rounded to it.

No library is used: those for weights or caches (torchao, quanto, hqq, the quantized cache of transformers)
quantize whole tensors to one precision. Here the precision differs by token within a row, rows are ragged,
beam search reorders the codes, and later images append to them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvprune.errors import QuantizationError
from kvprune.tokens.precision import accumulation_dtype

__all__ = ["QUANTIZED_BITS", "Quantized", "group_width", "pack", "quantize", "unpack"]

QUANTIZED_BITS = (8, 4, 2)
"""Supported precisions, in bits per number."""

_MOST_CHANNELS = 64
_LEAST_CHANNELS = 16


def group_width(width: int) -> int:
    """Return the number of channels in a group, for vectors with ``width`` channels.

    This is the largest divisor of ``width`` up to 64. If that is below 16, the lowest and highest numbers of
    the groups would take more memory than the codes, so the whole vector is one group.

    Example:
        >>> group_width(128), group_width(96), group_width(134)
        (64, 48, 134)
    """
    divisor = max(size for size in range(1, min(width, _MOST_CHANNELS) + 1) if width % size == 0)
    return divisor if divisor >= _LEAST_CHANNELS else width


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last axis, ``[..., D]`` to ``[..., ceil(D * bits / 8)]``.

    The first code of a byte is in its lowest bits.

    Args:
        codes: uint8, each below ``2 ** bits``.
        bits: 8, 4 or 2.

    Example:
        >>> pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist()
        [33, 3]
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
    """Undo `pack`: return codes ``[..., width]``."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = (packed[..., None] >> shifts) & (2**bits - 1)  # [..., bytes, codes per byte]
    unpacked: Tensor = codes.flatten(-2)[..., :width]
    return unpacked


@dataclass(frozen=True, eq=False)
class Quantized:
    """Quantized vectors ``[..., D]``.

    Args:
        codes: uint8 ``[..., ceil(D * bits / 8)]``, see `pack`.
        low: ``[..., groups]``, the lowest number of each group, in the dtype of the vectors.
        high: ``[..., groups]``, the highest number of each group, in the dtype of the vectors.
        bits: 8, 4 or 2.
        width: Number of channels D.
    """

    codes: Tensor
    low: Tensor
    high: Tensor
    bits: int
    width: int

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All tensors that are stored."""
        return self.codes, self.low, self.high

    @property
    def nbytes(self) -> int:
        """Size of all stored tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def steps(self) -> Tensor:
        """Distance between neighbouring levels, ``[..., groups]``; the error is at most half of it."""
        exact = accumulation_dtype(self.low.dtype)
        steps: Tensor = (self.high.to(exact) - self.low.to(exact)) / (2**self.bits - 1)
        return steps

    def map(self, move: Callable[[Tensor], Tensor]) -> Quantized:
        """Apply an operation that does not change the last axis, such as indexing rows, to all tensors."""
        codes, low, high = (move(tensor) for tensor in self.tensors)
        return replace(self, codes=codes, low=low, high=high)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Quantized:
        """Move to a device, and convert ``low`` and ``high`` to a dtype; codes are not converted."""
        moved = self if device is None else self.map(lambda tensor: tensor.to(device))
        return moved if dtype is None else replace(moved, low=moved.low.to(dtype), high=moved.high.to(dtype))

    def dequantize(self) -> Tensor:
        """Return the vectors ``[..., D]`` in their original dtype, without a host transfer."""
        groups = self.low.shape[-1]
        steps = self.steps[..., None]
        codes = unpack(self.codes, self.bits, self.width).unflatten(-1, (groups, -1)).to(steps.dtype)
        # In float32 for 16-bit dtypes, whose rounding errors would exceed a step of 8 bits.
        levels = codes.mul_(steps).add_(self.low[..., None].to(steps.dtype))  # [..., groups, channels]
        vectors: Tensor = levels.flatten(-2).to(self.low.dtype)
        return vectors


def quantize(vectors: Tensor, bits: int) -> Quantized:
    """Quantize vectors ``[..., D]``, each on its own.

    Args:
        vectors: Floating-point tensor, D at least 1.
        bits: 8, 4 or 2.

    Raises:
        QuantizationError: If ``bits`` is another number, ``vectors`` is of another kind, or a number is not
            finite, or two numbers of a group are so far apart that their difference overflows.

    Example:
        >>> quantize(torch.tensor([0.0, 1.0, 2.0, 3.0]), 2).dequantize()
        tensor([0., 1., 2., 3.])
    """
    if bits not in QUANTIZED_BITS:
        raise QuantizationError(f"vectors are quantized to 8, 4 or 2 bits, got {bits!r}")
    if not vectors.is_floating_point() or vectors.shape[-1] < 1:
        raise QuantizationError(
            "only vectors [..., D] of a floating-point dtype with D of at least 1 can be quantized, "
            f"got {vectors.dtype} {list(vectors.shape)}"
        )
    width = vectors.shape[-1]
    grouped = vectors.unflatten(-1, (-1, group_width(width)))  # [..., groups, channels]
    low, high = grouped.amin(-1), grouped.amax(-1)  # [..., groups]
    # In float64, so that all devices round alike; MPS has only float32.
    exact = torch.float32 if vectors.device.type == "mps" else torch.float64
    reach = high.to(exact) - low.to(exact)
    most = torch.finfo(accumulation_dtype(vectors.dtype)).max / 2
    if not bool((reach <= most).all()):  # comparisons with NaN are false
        raise QuantizationError(
            f"keys or values from {float(vectors.min()):g} to {float(vectors.max()):g} ({vectors.dtype}) "
            f"cannot be quantized: they must be finite and lie within {most:g} of each other"
        )
    steps = (reach / (2**bits - 1))[..., None]
    codes = (grouped.to(exact) - low[..., None].to(exact)).div_(torch.where(steps > 0, steps, 1.0))
    codes = codes.round_().clamp_(0, 2**bits - 1).to(torch.uint8).flatten(-2)
    return Quantized(pack(codes, bits), low, high, bits, width)
