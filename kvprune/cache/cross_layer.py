"""The cache layer that holds kept cross-attention keys and values, and everything that must move with them.

State has one owner. Keys, values, the columns they came from and their validity live in one object inside
the model's ordinary cache, so whatever transformers does to a cache (reorder for beams, expand, select,
reset, deep copy, hand back in the next turn) happens to all of them together (KV11).

Beams and return sequences of one sample see one image. Their rows are held once: R rows stand for
B = R x copies rows of the batch, each ``copies`` in a row. `kvprune.cache.placement` decides
which cache may hold this layer.

Entries of low precision lie in pools, one for each number of bits, and come before those in the own dtype.
What attention reads is put together for one layer and one call (`CrossKVLayer.spread`) and dropped after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from kvprune.cache.contents import Arrival, Contents, HeldEntries
from kvprune.cache.copies import Twins
from kvprune.cache.retention import retained
from kvprune.tokens.selection import Selection

__all__ = ["CrossKVLayer"]


class CrossKVLayer(HeldEntries):
    """Kept keys and values of one cross-attention layer, and all that a cache may do with them.

    See `HeldEntries` for the attributes.
    """

    # Shapes do not change while decoding, and nothing is read from the device.
    is_compileable = True

    def __init__(self) -> None:
        super().__init__()
        self._arrival: Arrival | None = None

    @classmethod
    def adopt(cls, layer: DynamicLayer) -> Self:
        """Return a cache layer that holds what an ordinary one holds."""
        adopted = cls()
        keys, values = layer.keys, layer.values
        if keys is not None and values is not None and keys.numel():
            adopted.lazy_initialization(keys, values)
            adopted._hold(keys, values)
            adopted.columns = keys.shape[-2]
        return adopted

    def expect(self, received: Selection | None, columns: int, twins: Twins | None = None) -> Arrival:
        """Say what the next `update` brings, and return what the layer will hold then.

        Args:
            received: Which of the new columns arrive, for each row that will be held; None for all of them.
            columns: How many new columns there are, dropped ones included.
            twins: Which of the batch's rows are equal, so that one of each may be held. A layer that is
                filled already takes them only if it holds the same ones as one; else it holds all rows.
        """
        if not self.is_filled:
            self.twins = twins or Twins()
        self._arrival = Arrival(received, columns, self._contents_after(received, columns))
        return self._arrival

    def _contents_after(self, received: Selection | None, columns: int) -> Contents:
        if received is None:
            if self.slots is None:
                return Contents(copies=self.copies)
            received = Selection.all(self.slots.shape[0], columns, self.slots.device)
        ragged = self.ragged or received.is_ragged
        if not self.is_filled:
            return Contents(received.indices, received.valid, None, ragged, self.copies)
        slots, valid = self.entries()
        heads = slots.shape[1]
        new_slots = (received.indices + self.columns).to(slots.device).expand(-1, heads, -1)
        new_valid = received.valid.to(valid.device).expand(-1, heads, -1)
        slots, valid = torch.cat([slots, new_slots], -1), torch.cat([valid, new_valid], -1)
        bias = self.bias
        if bias is not None:  # entries that come have none
            bias = torch.nn.functional.pad(bias, (0, slots.shape[-1] - bias.shape[-1]))
        return Contents(slots, valid, bias, ragged, self.copies)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the keys and values of newly arrived columns and return all that there are.

        Args:
            key_states: ``[B, Hkv, new, D]``, for each row of the batch.
            value_states: Likewise.
            args: Not used.
            kwargs: Not used.
        """
        arrival = self._arrival or self.expect(None, key_states.shape[-2], self.twins)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.is_filled:  # each row on its own, and new entries at the end
            own = [(self.keys, self.values)] if self.own else []
            sides = zip(*own, (key_states, value_states), strict=True)
            self._hold(*(torch.cat(side, dim=-2) for side in sides))
            keys, values = self.spread()
        else:  # one copy, as in stock, whose concatenation also makes the projections contiguous
            keys, values = key_states.contiguous(), value_states.contiguous()
            self._hold(keys, values)
            if self.copies > 1:  # cloned: a view would keep the rows alive that it leaves out
                self._hold(keys[:: self.copies].clone(), values[:: self.copies].clone())
        self.columns += arrival.columns
        after = arrival.contents
        self.slots, self.valid, self.bias, self.ragged = after.slots, after.valid, after.bias, after.ragged
        self._arrival = None
        return keys, values

    def retain(self, kept: Selection) -> None:
        """Drop the entries that are not kept, and free their memory; what is merged lives on in what is kept.

        Args:
            kept: Which of the K entries stay, with what is merged into them, or the precision in which they
                are held from now on (see `retained`).

        Raises:
            QuantizationError, UnsupportedCacheError: See `retained`.
        """
        after = retained(self, kept)
        if after is None:
            return
        self._hold(after.keys, after.values)
        self.pools = after.pools
        self.slots, self.valid, self.bias = after.slots, after.valid, after.bias
        self.ragged = not bool(after.valid.all())

    def spread(self) -> tuple[Tensor, Tensor]:
        """Return keys and values for each row of the batch in the own dtype, ``[B, Hkv, K, D]``.

        Without a copy if nothing is quantized and no rows are held as one, or all of them are (one sample
        with its beams); otherwise a copy that lives as long as the caller holds it. Waits for no device.
        """
        if not self.pools:
            return self._spread(self.keys), self._spread(self.values)
        read = [pool.dequantize() for pool in self.pools]
        if self.own:
            read.append((self.keys, self.values))
        keys, values = (torch.cat(tensors, dim=-2) for tensors in zip(*read, strict=True))
        return self._spread(keys), self._spread(values)

    def _spread(self, tensor: Tensor) -> Tensor:
        if self.copies == 1:
            return tensor
        if tensor.shape[0] == 1:
            return tensor.expand(self.copies, *tensor.shape[1:])
        return tensor.repeat_interleave(self.copies, dim=0)

    def separate(self) -> None:
        """Hold each row of the batch on its own from now on."""
        if self.copies > 1:
            rows = torch.arange(self.keys.shape[0] * self.copies, device=self.keys.device) // self.copies
            self._over_rows(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))
            self.twins = Twins()

    def get_seq_length(self) -> int:
        """Number of columns seen, as stock would answer: kept or not, they were part of the sequence."""
        return self.columns

    def crop(self, tokens_to_remove: int) -> None:
        """Do nothing: cropping takes back text tokens, and these are image tokens."""

    def reset(self) -> None:
        """Forget everything that is held."""
        super().reset()
        self.columns, self.slots, self.valid, self.ragged, self._arrival = 0, None, None, False, None
        self.bias = None
        self.pools, self._stands_in = (), True
        self.twins = Twins()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch, for beam search: nothing moves where beams of a sample are held as one."""
        if self.is_filled and not self.twins.stay(beam_idx):
            self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch: what is held does not grow."""
        if self.is_filled:
            self.twins = Twins(self.copies * repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only some rows of the batch, each on its own."""
        if self.is_filled:
            rows = torch.arange(self.keys.shape[0] * self.copies, device=indices.device)[indices]
            rows = rows // self.copies
            self._over_rows(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))
            self.twins = Twins()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        """Move what is held to a device, and keys and values to a dtype."""
        if not self.is_filled:
            return
        self._over_rows(lambda tensor: tensor.to(device) if device is not None else tensor)
        if dtype is not None:
            self._move(lambda tensor: tensor.to(dtype))
            self.pools = tuple(pool.to(dtype=dtype) for pool in self.pools)
        self.dtype, self.device = self.keys.dtype, self.keys.device

    def _over_rows(self, move: Callable[[Tensor], Tensor]) -> None:
        self._move(move)
        self.pools = tuple(pool.map(move) for pool in self.pools)
        if self.slots is not None and self.valid is not None:
            self.slots, self.valid = move(self.slots), move(self.valid)
        if self.bias is not None:
            self.bias = move(self.bias)

    def _move(self, move: Callable[[Tensor], Tensor]) -> None:
        """Apply an operation on rows or dtype to entries in the own dtype, of which there may be none."""
        self.keys, self.values = move(self.keys), move(self.values)
        if self._stands_in:  # one number again
            self._hold(self.keys[..., :0, :], self.values[..., :0, :])

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        """Hold these entries in the own dtype, or what stands for none of them."""
        self._stands_in = not keys.shape[-2]
        if self._stands_in:
            keys, values = (
                side.new_zeros(1).expand(*side.shape[:2], 1, side.shape[-1]) for side in (keys, values)
            )
        self.keys, self.values = keys, values
