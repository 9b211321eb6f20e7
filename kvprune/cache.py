"""The cache layer that holds kept cross-attention keys and values, and everything that must move with them.

State has one owner. Keys, values, the columns they came from and their validity live in one object inside
the model's ordinary cache, so whatever transformers does to a cache (reorder for beams, expand, select,
reset, deep copy, hand back in the next turn) happens to all of them together (KV11).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from kvprune.errors import UnsupportedCacheError
from kvprune.selection import Selection

__all__ = ["CrossKVLayer", "open_layer", "require_cache"]


class CrossKVLayer(DynamicLayer):
    """Kept keys and values of one cross-attention layer.

    Attributes:
        keys, values: ``[B, Hkv, K, D]``.
        columns: Columns seen so far, S: what stock transformers would hold.
        slots: int64 ``[B, H or 1, K]``, the column each entry came from; None while all S are held.
        valid: bool, same shape; false where an entry only pads a ragged batch. None while ``slots`` is None.
        ragged: Whether some entry may be invalid, known without asking the device.
    """

    # Optional in the base class; here they are read only once they are filled.
    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.columns = 0
        self.slots: Tensor | None = None
        self.valid: Tensor | None = None
        self.ragged = False
        self._announced: Selection | None = None

    @classmethod
    def adopt(cls, layer: DynamicLayer) -> CrossKVLayer:
        """Return a cache layer that holds what an ordinary one holds."""
        adopted = cls()
        keys, values = layer.keys, layer.values
        if keys is not None and values is not None and keys.numel():
            adopted.lazy_initialization(keys, values)
            adopted.keys, adopted.values, adopted.columns = keys, values, keys.shape[-2]
        return adopted

    @property
    def is_filled(self) -> bool:
        """Whether anything is held."""
        return self.columns > 0

    def held_columns(self) -> Tensor:
        """Return which columns are held, bool ``[B, H or 1, S]``."""
        slots, _ = self.entries()
        held = torch.zeros(*slots.shape[:2], self.columns, dtype=torch.bool, device=slots.device)
        return held.scatter_(-1, slots, True)  # padding repeats a column that is held

    @property
    def bytes_held(self) -> int:
        """Bytes of the keys and values that are held, padding of ragged batches included."""
        return self.keys.nbytes + self.values.nbytes if self.is_filled else 0

    @property
    def bytes_full(self) -> int:
        """Bytes of keys and values that stock transformers would hold."""
        return self.bytes_held // self.keys.shape[-2] * self.columns if self.is_filled else 0

    @property
    def bytes_of_bookkeeping(self) -> int:
        """Bytes of the column numbers and validity flags beside the keys and values."""
        return sum(tensor.nbytes for tensor in (self.slots, self.valid) if tensor is not None)

    def announce(self, arriving: Selection | None) -> None:
        """Say which of the new columns the next `update` brings; None means all of them."""
        self._announced = arriving

    def expected(self, columns: int) -> tuple[Tensor, Tensor] | None:
        """Return slots and validity after the announced update of ``columns`` new columns.

        None means all columns, in order.
        """
        arriving = self._announced
        if self.slots is None and arriving is None:
            return None
        if arriving is None:
            assert self.slots is not None
            arriving = Selection.all(self.slots.shape[0], columns, self.slots.device)
        if not self.is_filled:
            return arriving.indices, arriving.valid
        slots, valid = self.entries()
        heads = slots.shape[1]
        new_slots = (arriving.indices + self.columns).to(slots.device).expand(-1, heads, -1)
        new_valid = arriving.valid.to(valid.device).expand(-1, heads, -1)
        return torch.cat([slots, new_slots], -1), torch.cat([valid, new_valid], -1)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the keys and values of newly arrived columns and return all that are held."""
        arriving = self._announced
        columns = key_states.shape[-2] if arriving is None else arriving.columns
        expected = self.expected(columns)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.is_filled:
            self.keys = torch.cat([self.keys, key_states], dim=-2)
            self.values = torch.cat([self.values, value_states], dim=-2)
        else:  # one copy, as in stock, whose concatenation also makes the projections contiguous
            self.keys, self.values = key_states.contiguous(), value_states.contiguous()
        self.columns += columns
        if expected is not None:
            self.slots, self.valid = expected
            self.ragged = self.ragged or (arriving is not None and arriving.is_ragged)
        self._announced = None
        return self.keys, self.values

    def retain(self, kept: Tensor) -> None:
        """Drop what is not kept, and free its memory.

        Args:
            kept: bool ``[B, H or 1, W]`` over the W entries that are held now.
        """
        if self.valid is not None:
            kept = kept & self.valid
        if bool(kept.all()):
            return
        positions = Selection.from_mask(kept)
        slots, _ = self.entries()
        if slots.shape[1] != positions.indices.shape[1]:
            slots = slots.expand(-1, positions.indices.shape[1], -1)
        index = positions.indices[..., None].expand(-1, self.keys.shape[1], -1, self.keys.shape[-1])
        self.keys = self.keys.gather(-2, index)
        self.values = self.values.gather(-2, index[..., : self.values.shape[-1]])
        self.slots, self.valid = slots.gather(-1, positions.indices), positions.valid
        self.ragged = positions.is_ragged

    def get_seq_length(self) -> int:
        """Number of columns seen, as stock would answer: kept or not, they were part of the sequence."""
        return self.columns

    def crop(self, tokens_to_remove: int) -> None:
        """Do nothing: cropping takes back text tokens, and these are image tokens."""

    def reset(self) -> None:
        """Forget everything that is held."""
        super().reset()
        self.columns, self.slots, self.valid, self.ragged, self._announced = 0, None, None, False, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder samples, for beam search."""
        self._over_batch(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sample."""
        self._over_batch(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only some samples."""
        self._over_batch(lambda tensor: tensor[indices.to(tensor.device)])

    def _over_batch(self, move: Any) -> None:
        if not self.is_filled:
            return
        self.keys, self.values = move(self.keys), move(self.values)
        if self.slots is not None and self.valid is not None:
            self.slots, self.valid = move(self.slots), move(self.valid)

    def entries(self) -> tuple[Tensor, Tensor]:
        """Return the column and the validity of each entry, ``[B, H or 1, K]``, also if all are held."""
        if self.slots is not None and self.valid is not None:
            return self.slots, self.valid
        everything = Selection.all(self.keys.shape[0], self.columns, self.keys.device)
        return everything.indices, everything.valid


def require_cache(cache: object) -> Cache:
    """Return the cache, or raise because there is none that could be compressed.

    Raises:
        UnsupportedCacheError: If there is no cache, or it offloads its layers.
    """
    if cache is None:
        raise UnsupportedCacheError(
            "kvprune compresses the cross-attention cache, but the model was called without one "
            "(past_key_values=None, use_cache=False); call it with use_cache=True"
        )
    if not isinstance(cache, Cache):
        raise UnsupportedCacheError(
            f"kvprune knows the caches of transformers (DynamicCache), got {type(cache).__name__}"
        )
    if cache.offloading:
        raise UnsupportedCacheError(
            f"{type(cache).__name__} offloads its layers, which transformers does not do correctly for "
            "cross-attention; use the default DynamicCache"
        )
    return cache


def open_layer(cache: Cache, layer_idx: int) -> CrossKVLayer:
    """Return our layer at an index of a cache, taking the place of an ordinary dynamic one.

    Raises:
        UnsupportedCacheError: If the layer there is of another kind (static, quantized, sliding).
    """
    while len(cache.layers) <= layer_idx:  # DynamicCache() without a config grows as it is used
        if cache.layer_class_to_replicate is None:
            raise UnsupportedCacheError(
                f"{type(cache).__name__} has {len(cache.layers)} layers, but layer {layer_idx} is a "
                "cross-attention layer; build the cache from the model's config"
            )
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[layer_idx]
    if isinstance(layer, CrossKVLayer):
        return layer
    if type(layer) is not DynamicLayer:
        raise UnsupportedCacheError(
            f"{type(cache).__name__} holds a {type(layer).__name__} at cross-attention layer {layer_idx}; "
            "kvprune compresses DynamicLayer: generate with the default cache "
            "(no cache_implementation, or a DynamicCache)"
        )
    ours = CrossKVLayer.adopt(layer)
    cache.layers[layer_idx] = ours
    return ours
