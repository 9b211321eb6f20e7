"""Which entries of a cache go into which pool of quantized ones, and how pools are cut and joined."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvprune.cache.quantization import QUANTIZED_BITS, Pool

__all__ = ["Part", "join", "lower", "pack_left"]


@dataclass(frozen=True)
class Part:
    """Entries of a pool, with their places among the entries before and validity, ``[R, H or 1, K]``."""

    pool: Pool
    places: Tensor
    valid: Tensor

    @property
    def bits(self) -> int:
        """In which precision they are held."""
        return self.pool.bits


def lower(kept: Tensor, bits: Tensor | None) -> dict[int, Tensor]:
    """Return which kept entries are to be quantized, by their bits; only widths that some entry gets."""
    if bits is None:
        return {}
    masks = {width: kept & (bits == width) for width in QUANTIZED_BITS}
    found: list[bool] = torch.stack([mask.any() for mask in masks.values()]).tolist()
    return {width: mask for (width, mask), some in zip(masks.items(), found, strict=True) if some}


def pack_left(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places of kept entries, int64 ``[R, H, most]``, and which of them are no padding.

    Padding repeats the last kept entry of its row, or the first entry of a row that keeps none.
    """
    counts = kept.sum(-1, keepdim=True)
    most = int(counts.max())
    places = (~kept).to(torch.uint8).argsort(dim=-1, stable=True)[..., :most]
    valid = torch.arange(most, device=kept.device) < counts
    if not most:
        return places, valid
    last = places.gather(-1, (counts - 1).clamp(min=0))
    return torch.where(valid, places, last), valid


def join(parts: list[Part]) -> Part:
    """Join entries of equal bits, without the padding between them."""
    if len(parts) == 1:
        return parts[0]
    pool = Pool.cat([part.pool for part in parts])
    places, valid = torch.cat([p.places for p in parts], -1), torch.cat([p.valid for p in parts], -1)
    place, packed = pack_left(valid)
    if place.shape[-1] == valid.shape[-1]:
        return Part(pool, places, valid)
    return Part(pool.at(place), places.gather(-1, place), packed)
