"""Computes what a cross-attention cache layer holds after entries are dropped, merged or quantized.

These are pure functions; `CrossKVLayer.retain` stores their result in the layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvprune.cache.contents import HeldEntries
from kvprune.cache.pools import Part, Pool, gather_entries, join_parts, masks_by_bits
from kvprune.cache.quantization import QUANTIZED_BITS
from kvprune.errors import UnsupportedCacheError
from kvprune.tokens.merging import Merge, merge_heads
from kvprune.tokens.packing import pack_left
from kvprune.tokens.precision import accumulation_dtype
from kvprune.tokens.selection import Selection

__all__ = ["Retained", "evicted", "retained"]


@dataclass(frozen=True, eq=False)
class Retained:
    """New contents of a layer; fields as in `HeldEntries`."""

    keys: Tensor
    values: Tensor
    slots: Tensor
    valid: Tensor
    bias: Tensor | None
    pools: tuple[Pool, ...] = ()


def retained(layer: HeldEntries, kept: Selection) -> Retained | None:
    """Return the contents of a layer after only some of its entries are kept; None if nothing changes.

    Args:
        layer: A layer that is filled.
        kept: Which of its K entries are kept, with ``columns`` = K; only valid entries. ``bits`` is the new
            precision of each entry; entries that are already quantized keep theirs.

    Raises:
        QuantizationError: If an entry to be quantized is not finite.
        UnsupportedCacheError: If entries would be both merged and quantized.
    """
    if kept.merge is not None:
        if layer.pools:
            raise UnsupportedCacheError(
                "entries of this cache are quantized, and a later decision merges entries; a cache supports "
                "only one of these: start with an empty cache"
            )
        return _merged(layer, kept, kept.merge)
    if layer.pools or kept.bits is not None:
        return _repacked(layer, kept)
    # The width first: it is known without asking the device.
    if kept.indices.shape[-1] == layer.width and not kept.is_ragged:
        return None
    return _gathered(layer, kept)


def evicted(layer: HeldEntries, kept: Selection) -> Retained:
    """Return the contents of a layer after entries are dropped in a decode step; needs no device transfer.

    Args:
        layer: A layer that is filled, and shares no rows.
        kept: Which of its K entries stay; only valid ones, and no merge.

    Raises:
        UnsupportedCacheError: If entries are quantized.
    """
    if layer.pools:
        raise UnsupportedCacheError(
            f"a policy drops entries in a decode step, but {layer.width - layer.own} of {layer.width} "
            "entries of this layer are quantized; use a policy that does one of these"
        )
    return _gathered(layer, kept)


def _gathered(layer: HeldEntries, kept: Selection) -> Retained:
    """Drop entries of a layer without quantized entries."""
    places = kept.indices.expand(-1, _heads(layer, kept), -1)  # [R, H, K]
    return Retained(
        gather_entries(layer.keys, places),
        gather_entries(layer.values, places),
        *_bookkeeping(layer, places, kept.valid),
    )


def _repacked(layer: HeldEntries, kept: Selection) -> Retained | None:
    """Drop and quantize entries of a layer that holds several precisions, now or afterwards."""
    mask = kept.mask.expand(-1, _heads(layer, kept), -1)  # [R, H, K]
    quantized = layer.width - layer.own  # entries of the pools come first
    bits = None if kept.bits is None else kept.bits_by_column().expand_as(mask)[..., quantized:]  # [R, H, K']
    quantize = masks_by_bits(mask[..., quantized:], bits)  # masks [R, H, K'] by bits
    if bool(mask.all()) and not quantize:
        return None
    parts, own = _kept_parts(layer, mask), mask[..., quantized:]
    for width, chosen in quantize.items():
        place, valid = pack_left(chosen)
        parts.append(Part(Pool.of(layer.keys, layer.values, place, width), place + quantized, valid))
        own = own & ~chosen
    place, valid = pack_left(own)  # [R, H, entries left in the own dtype]
    joined = [join_parts(same) for bits in QUANTIZED_BITS if (same := [p for p in parts if p.bits == bits])]
    places = torch.cat([*(part.places for part in joined), place + quantized], -1)  # [R, H, new K]
    return Retained(
        gather_entries(layer.keys, place),
        gather_entries(layer.values, place),
        *_bookkeeping(layer, places, torch.cat([*(part.valid for part in joined), valid], -1)),
        tuple(part.pool for part in joined),
    )


def _kept_parts(layer: HeldEntries, mask: Tensor) -> list[Part]:
    """Return the kept entries of each pool; ``mask`` is bool ``[R, H, K]``."""
    parts, first = [], 0
    for pool in layer.pools:
        place, valid = pack_left(mask[..., first : first + pool.width])
        if place.shape[-1]:
            parts.append(Part(pool.at(place), place + first, valid))
        first += pool.width
    return parts


def _merged(layer: HeldEntries, kept: Selection, merge: Merge) -> Retained:
    """Merge dropped entries into kept ones."""
    entries = kept.indices.shape[-1]
    places = kept.indices.expand(-1, _heads(layer, kept), -1)  # [R, H, new K]
    slots, valid, bias = _bookkeeping(layer, places, kept.valid)
    if merge.size_bias:
        # Entries with a bias are older and take no members, so their logarithm is 0 and the sum is exact.
        sizes = merge.members(entries).clamp(min=1).to(accumulation_dtype(layer.keys)).log()  # [R, H, K]
        bias = sizes if bias is None else bias + sizes
    return Retained(
        merge_heads(layer.keys, merge, entries, renormalize=merge.renormalize_keys),
        merge_heads(layer.values, merge, entries),
        slots,
        valid,
        bias,
    )


def _heads(layer: HeldEntries, kept: Selection) -> int:
    """Return how many heads hold entries of their own afterwards; 1 if all heads share theirs."""
    held = 1 if layer.slots is None else layer.slots.shape[1]
    return max(held, kept.indices.shape[1])


def _bookkeeping(layer: HeldEntries, places: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return columns, validity and bias of the entries at ``places``, int64 ``[R, H, K]``."""
    heads = places.shape[1]
    slots = layer.entries()[0].expand(-1, heads, -1).gather(-1, places)  # [R, H, new K]
    bias = None if layer.bias is None else layer.bias.expand(-1, heads, -1).gather(-1, places)
    return slots, valid.expand_as(places).clone(), bias
