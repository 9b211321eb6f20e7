"""The cache layer that holds the kept cross-attention keys and values.

State has one owner. Keys, values, their columns and their validity live in one object inside the model's
ordinary cache. So whatever transformers does to a cache (reorder for beams, expand, select, reset, deep copy,
reuse in the next turn) applies to all of them together (KV11). `kvprune.cache.placement` decides which caches
may hold this layer.

Beams and return sequences of one sample see the same image, so they are held once: each of the R held rows
represents ``copies`` consecutive rows of the batch, B = R x copies.

Quantized entries are stored in pools, one for each number of bits, and come before entries in the layer's own
dtype. For attention, `CrossKVLayer.spread` assembles keys and values for one layer and one call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from kvprune.cache.contents import Arrival, Contents, HeldEntries
from kvprune.cache.pools import gather_entries
from kvprune.cache.retention import evicted, retained
from kvprune.cache.shared_rows import SharedRows
from kvprune.cache.step_memory import StepMemory
from kvprune.errors import UnsupportedCacheError
from kvprune.tokens.packing import repeat_rows
from kvprune.tokens.selection import Selection

__all__ = ["CrossKVLayer"]


class CrossKVLayer(HeldEntries):
    """Kept keys and values of one cross-attention layer, with the operations of a cache layer.

    See `HeldEntries` for the attributes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._arrival: Arrival | None = None
        self.steps: StepMemory | None = None  # of a policy that decides in decode steps

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Whether decoding can be compiled: it changes no shapes and reads nothing from the device."""
        return self.steps is None or (self.steps.compiles and self.host is None)

    @classmethod
    def adopt(cls, layer: DynamicLayer) -> Self:
        """Return a layer with the keys and values of a layer of transformers."""
        adopted = cls()
        keys, values = layer.keys, layer.values
        if keys is not None and values is not None and keys.numel():
            adopted.lazy_initialization(keys, values)
            adopted._hold(keys, values)
            adopted.columns = keys.shape[-2]
        return adopted

    def expect(
        self, received: Selection | None, columns: int, shared_rows: SharedRows | None = None
    ) -> Arrival:
        """Announce the columns of the next `update`, and return what the layer will hold after it.

        Args:
            received: The new columns that arrive, for each held row; None for all of them.
            columns: Number of new columns, including dropped ones.
            shared_rows: Equal rows of the batch, to be held once; used only while the layer is empty.
        """
        self.from_host()
        if not self.is_filled:
            self.shared_rows = shared_rows or SharedRows()
        self._arrival = Arrival(received, columns, self._contents_after(received, columns))
        return self._arrival

    def _contents_after(self, received: Selection | None, columns: int) -> Contents:
        """Return the contents after new columns are appended."""
        if received is None:
            if self.slots is None:
                return Contents(copies=self.copies)
            received = Selection.all(self.slots.shape[0], columns, self.slots.device)
        ragged = self.ragged or received.is_ragged
        if not self.is_filled:
            return Contents(received.indices, received.valid, None, ragged, self.copies)
        slots, valid = self.entries()  # [R, H or 1, K]
        heads = slots.shape[1]
        new_slots = (received.indices + self.columns).to(slots.device).expand(-1, heads, -1)  # [R, H, new]
        new_valid = received.valid.to(valid.device).expand(-1, heads, -1)
        slots, valid = torch.cat([slots, new_slots], -1), torch.cat([valid, new_valid], -1)
        bias = self.bias
        if bias is not None:  # new entries have none
            bias = torch.nn.functional.pad(bias, (0, slots.shape[-1] - bias.shape[-1]))
        return Contents(slots, valid, bias, ragged, self.copies)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new columns, and return all keys and values, ``[B, Hkv, K, D]``.

        Args:
            key_states: ``[B, Hkv, new, D]``, for each row of the batch.
            value_states: ``[B, Hkv, new, D]``.
            args: Not used.
            kwargs: Not used.
        """
        arrival = self._arrival or self.expect(None, key_states.shape[-2], self.shared_rows)
        expected = arrival.columns if arrival.received is None else arrival.received.indices.shape[-1]
        if key_states.shape[-2] != expected:
            raise UnsupportedCacheError(
                "the text and the encoder states of a call must have the same batch: keys of "
                f"{key_states.shape[-2]} columns reached a cache layer that expected {expected}"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.is_filled:  # a later image: no shared rows, new entries at the end
            own = [(self._keys, self._values)] if self.own else []
            sides = zip(*own, (key_states, value_states), strict=True)
            self._hold(*(torch.cat(side, dim=-2) for side in sides))
            keys, values = self.spread()
        else:  # a contiguous copy, as stock makes by its concatenation
            keys, values = key_states.contiguous(), value_states.contiguous()
            self._hold(keys, values)
            if self.copies > 1:  # cloned, because a view would keep all rows in memory
                self._hold(keys[:: self.copies].clone(), values[:: self.copies].clone())
        self.columns += arrival.columns
        after = arrival.contents
        self.slots, self.valid, self.bias, self.ragged = after.slots, after.valid, after.bias, after.ragged
        self._arrival = None
        return keys, values

    def retain(self, kept: Selection) -> None:
        """Drop the entries that are not kept, and free their memory; merge or quantize as the selection says.

        Args:
            kept: Which of the K entries are kept, optionally with a merge, or with the precision of each
                (see `retained`).

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

    def evict(self, kept: Selection) -> None:
        """Drop entries in a decode step, without asking the device; see `evicted`.

        Args:
            kept: Which of the K entries of each row of the batch stay, ``[B, H or 1, n]``. Rows are no longer
                shared, because they may keep different entries.

        Raises:
            UnsupportedCacheError: If entries are quantized, or lie in host memory.
        """
        if self.host is not None:
            raise UnsupportedCacheError(
                "a policy drops entries in a decode step, but those of this layer lie in host memory "
                "(offload); what it drops in prefill is freed as always"
            )
        self.separate()
        after = evicted(self, kept)
        self._hold(after.keys, after.values)
        self.slots, self.valid, self.bias, self.ragged = after.slots, after.valid, after.bias, True

    def assembled(self) -> tuple[Tensor, Tensor]:
        """Return keys and values in the layer's own dtype for held rows, ``[R, Hkv, K, D]``.

        A copy if some entries are quantized, or all lie in host memory, which the layer does not keep. The
        host does not wait for the device.
        """
        if self.host is not None:
            return self.host.abroad(self._keys), self.host.abroad(self._values)
        if not self.pools:
            return self._keys, self._values
        read = [pool.dequantize() for pool in self.pools]
        if self.own:
            read.append((self._keys, self._values))
        keys, values = (torch.cat(tensors, dim=-2) for tensors in zip(*read, strict=True))
        return keys, values

    def spread(self) -> tuple[Tensor, Tensor]:
        """Return keys and values for each row of the batch in the layer's own dtype, ``[B, Hkv, K, D]``.

        Returns views if nothing is quantized, and no rows are shared or all of them are (one sample with its
        beams); otherwise a copy, which the layer does not keep. Needs no device transfer.
        """
        keys, values = self.assembled()
        return self._spread(keys), self._spread(values)

    def read(self, places: Tensor, flat: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return some entries of each row of the batch in the layer's own dtype, ``[B, Hkv, n, D]``, copied.

        Args:
            places: int64 ``[B, H or 1, n]``, which of the K entries.
            flat: What `places` returns for them, if the caller has it.
        """
        if self.host is not None:
            return self.fetched(places).result()
        keys, values = self.assembled()
        if not keys.is_contiguous() or not values.is_contiguous():
            return gather_entries(self._spread(keys), places), gather_entries(self._spread(values), places)
        # Whole entries are copied by their place among all of the layer, which is faster than a gather.
        flat = self.places(places) if flat is None else flat  # [B * Hkv * n]
        shape = places.shape[0], keys.shape[1], places.shape[-1]
        read = (side.view(-1, side.shape[-1]).index_select(0, flat) for side in (keys, values))
        chosen_keys, chosen_values = (side.view(*shape, side.shape[-1]) for side in read)
        return chosen_keys, chosen_values

    def _spread(self, tensor: Tensor) -> Tensor:
        """Repeat held rows ``[R, ...]`` for each row of the batch, ``[B, ...]``."""
        return repeat_rows(tensor, self.copies)

    def separate(self) -> None:
        """Hold a copy for each row of the batch from now on: rows are no longer shared."""
        if self.copies > 1:
            rows = torch.arange(self._keys.shape[0] * self.copies, device=self._keys.device) // self.copies
            self._over_rows(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))
            if self.steps is not None and not self.steps.by_row:
                self.steps.repeat(self.copies)
            self.shared_rows = SharedRows()

    def get_seq_length(self) -> int:
        """Number of columns seen, kept or dropped, as a stock layer would return."""
        return self.columns

    def crop(self, tokens_to_remove: int) -> None:
        """Remove nothing that is held: these are encoder tokens, and cropping removes text tokens."""
        if self.host is not None:
            self.host.staged = None  # for a step of another number
        if self.steps is not None:
            self.steps.take_back(abs(tokens_to_remove))

    def reset(self) -> None:
        """Forget everything that is held."""
        self.is_initialized = False  # older releases would zero tensors that copies of this layer share
        super().reset()
        self.columns, self.slots, self.valid, self.ragged, self._arrival = 0, None, None, False, None
        self.bias = self.steps = self.host = None
        self.pools, self._stands_in = (), True
        self.shared_rows = SharedRows()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch, for beam search; no entry moves if only copies of a sample change places."""
        if not self.is_filled:
            return
        if not self.shared_rows.unchanged_by(beam_idx):
            self.batch_select_indices(beam_idx)
            return
        if self.steps is not None and self.steps.by_row:
            self.steps.select(beam_idx)
        if self.host is not None:
            self.host.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch; the repeated rows share what is held."""
        if self.is_filled:
            self.shared_rows = SharedRows(self.copies * repeats)
            if self.host is not None:
                self.host.staged = None
            if self.steps is not None and self.steps.by_row:
                self.steps.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only some rows of the batch; they are no longer shared."""
        if self.is_filled:
            rows = torch.arange(self._keys.shape[0] * self.copies, device=indices.device)[indices]
            rows = rows // self.copies
            self._over_rows(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))
            if self.steps is not None:
                self.steps.select(indices if self.steps.by_row else rows)
            if self.host is not None:
                self.host.select(indices)
            self.shared_rows = SharedRows()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        """Move what is held to a device, and keys and values to a dtype."""
        if not self.is_filled:
            return
        self.from_host()
        self._over_rows(lambda tensor: tensor.to(device) if device is not None else tensor)
        if self.steps is not None and device is not None:
            self.steps.to(device)
        if dtype is not None:
            self._move(lambda tensor: tensor.to(dtype))
            self.pools = tuple(pool.to(dtype=dtype) for pool in self.pools)
        self.dtype, self.device = self._keys.dtype, self._keys.device

    def _over_rows(self, move: Callable[[Tensor], Tensor]) -> None:
        """Apply an operation on rows or device to every tensor of the layer."""
        self._move(move)
        self.pools = tuple(pool.map(move) for pool in self.pools)
        if self.slots is not None and self.valid is not None:
            self.slots, self.valid = move(self.slots), move(self.valid)
        if self.bias is not None:
            self.bias = move(self.bias)

    def _move(self, move: Callable[[Tensor], Tensor]) -> None:
        """Apply an operation on rows or dtype to `keys` and `values`, or to their placeholders."""
        self._keys, self._values = move(self._keys), move(self._values)
        if self.host is not None:
            self._keys, self._values = self.host.home(self._keys), self.host.home(self._values)
        if self._stands_in:  # make them views of one number again
            self._hold(self._keys[..., :0, :], self._values[..., :0, :])

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        """Set `keys` and `values`, or placeholders if there are no entries in the layer's own dtype."""
        self._stands_in = not keys.shape[-2]
        if self._stands_in:
            keys, values = (
                side.new_zeros(1).expand(*side.shape[:2], 1, side.shape[-1]) for side in (keys, values)
            )
        self._keys, self._values = keys, values
