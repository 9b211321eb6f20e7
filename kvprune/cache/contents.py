"""The data of a cross-attention cache layer: its entries, their columns, where they lie, and their size.

`CrossKVLayer` adds the operations on them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from kvprune.cache.host_memory import Courier, Fetch, HostMemory, Staged
from kvprune.cache.pools import Pool
from kvprune.cache.reader import Reader
from kvprune.cache.shared_rows import SharedRows
from kvprune.errors import UnsupportedCacheError
from kvprune.tokens.replacement import Replacement
from kvprune.tokens.selection import OWN_BITS, Selection

__all__ = ["Arrival", "Contents", "HeldEntries"]


@dataclass(frozen=True, eq=False)
class Contents:
    """The entries of a layer, as far as an attention mask depends on them.

    Axes: R rows that are held, K entries; H is the number of KV heads, or 1 if heads share entries.

    Args:
        slots: int64 ``[R, H or 1, K]``, the column of each entry; None while all columns are held.
        valid: bool, same shape; false at padding of a ragged batch. None while ``slots`` is None.
        bias: ``[R, H or 1, K]``, added to the attention logits of each entry; None for no bias.
        ragged: Whether some entries may be invalid; known on the host, without a device transfer.
        copies: Consecutive rows of the batch that each of the R rows represents.
    """

    slots: Tensor | None = None
    valid: Tensor | None = None
    bias: Tensor | None = None
    ragged: bool = False
    copies: int = 1


@dataclass(frozen=True, eq=False)
class Arrival:
    """The columns that arrive at a layer in one prefill, and what the layer holds after its next update.

    Args:
        received: The new columns that arrive, for R rows; None for all of them.
        columns: Number of new columns, including dropped ones.
        contents: What the layer holds after the update, and attends to.
        replaced: New tokens that arrive in the place of the received columns; None for the encoder's own.
    """

    received: Selection | None
    columns: int
    contents: Contents
    replaced: Replacement | None = None


class HeldEntries(DynamicLayer):
    """Keys and values of the entries of one cross-attention layer.

    Attributes:
        keys, values: ``[R, Hkv, K', D]``, entries in the layer's own dtype; R is the batch B divided by
            `copies`. If all entries are quantized, a placeholder with K' = 1 (a view of one number) stands
            here, because Mllama skips a layer whose keys are empty.
        pools: Quantized entries. The K entries of the layer are those of the pools in order, then these K'.
        columns: Columns seen so far, S: what stock transformers would hold.
        slots: int64 ``[R, H or 1, K]``, the column of each entry; None while all S columns are held.
        valid: bool, same shape; false at padding of a ragged batch. None while ``slots`` is None.
        bias: ``[R, H or 1, K]``, added to the attention logits of each entry; None for no bias.
        ragged: Whether some entries may be invalid; known on the host, without a device transfer.
        shared_rows: Which rows of the batch are held once.
        host: Set while `keys` and `values` lie in host memory, and not on the layer's `device`.
        reader: Cuts masks to what is held. Once it is released, modules cannot read `keys` and `values` of
            a pruned layer.
    """

    _keys: Tensor
    _values: Tensor

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reader: Reader | None = None
        self.pools: tuple[Pool, ...] = ()
        self._stands_in = True  # keys and values are placeholders
        self.columns = 0
        self.slots: Tensor | None = None
        self.valid: Tensor | None = None
        self.bias: Tensor | None = None
        self.ragged = False
        self.shared_rows = SharedRows()
        self.host: HostMemory | None = None

    # Optional in the base class; here they are read only after they are filled.
    @property
    def keys(self) -> Tensor:
        """Keys of the entries in the layer's own dtype; see the class.

        Raises:
            UnsupportedCacheError: If a module reads it, entries were dropped, and nobody cuts masks any more.
        """
        self._require_reader()
        return self._keys

    @keys.setter
    def keys(self, keys: Tensor) -> None:
        self._keys = keys

    @property
    def values(self) -> Tensor:
        """Values of the entries, as `keys`."""
        self._require_reader()
        return self._values

    @values.setter
    def values(self, values: Tensor) -> None:
        self._values = values

    def _require_reader(self) -> None:
        """Raise if a module of a model reads a pruned layer, and nobody cuts its mask; anybody may look."""
        if self.reader is None or self.reader.is_attached or (self.slots is None and self.is_readable):
            return
        # The frame that reads the property: attention is computed in a method of a module.
        if isinstance(sys._getframe(2).f_locals.get("self"), nn.Module):
            if self.host is not None:
                why = "lies in host memory, and outside the block nobody copies it to the device"
            else:
                why = (
                    f"was pruned under a compression that has ended: {self.width} of {self.columns} columns "
                    "are held, and outside the block no mask is cut to them"
                )
            raise UnsupportedCacheError(
                f"this cache {why}; continue inside the block of kvprune.compress, or inside a new one"
            )

    @property
    def place(self) -> torch.device:
        """The device on which the layer decodes; `keys` and `values` may lie in host memory meanwhile."""
        return self._keys.device if self.host is None else self.host.device

    @property
    def is_filled(self) -> bool:
        """Whether anything is held."""
        return self.columns > 0

    @property
    def copies(self) -> int:
        """Consecutive rows of the batch that each held row represents."""
        return self.shared_rows.copies

    @property
    def contents(self) -> Contents:
        """The entries, as far as an attention mask depends on them."""
        return Contents(self.slots, self.valid, self.bias, self.ragged, self.copies)

    @property
    def width(self) -> int:
        """Entries held per row and KV head, K."""
        return sum(self.widths.values())

    @property
    def widths(self) -> dict[int, int]:
        """Entries held per row and KV head, by bits; 16 means the layer's own dtype."""
        if not self.is_filled:
            return {}
        widths = {OWN_BITS: self.own} if self.own else {}
        return widths | {pool.bits: pool.width for pool in self.pools}

    @property
    def own(self) -> int:
        """Entries held in the layer's own dtype per row and KV head, K'."""
        return 0 if self._stands_in else self._keys.shape[-2]

    @property
    def is_readable(self) -> bool:
        """Whether attention can read `keys` and `values` directly: neither quantized, shared nor far away."""
        return self.copies == 1 and not self.pools and self.host is None

    def places(self, entries: Tensor) -> Tensor:
        """Return where entries of each row of the batch are among all of the layer, int64 ``[B * Hkv * n]``.

        Args:
            entries: int64 ``[B, H or 1, n]``, which of the K entries.
        """
        batch, heads, width = entries.shape[0], self._keys.shape[1], self.width
        first = torch.arange(0, batch * heads * width, width, device=entries.device).view(batch, heads, 1)
        if self.copies > 1:
            each = heads * width
            first = first // each // self.copies * each + first % each
        return (first + entries).flatten()

    def to_host(self, courier: Courier) -> None:
        """Move keys and values to host memory, until the next prefill; decode steps read copies.

        Waits for the device.

        Args:
            courier: Makes the copies.

        Raises:
            UnsupportedCacheError: If entries are quantized, or gradients would flow through them.
        """
        if self.pools or self._keys.requires_grad or self._values.requires_grad:
            why = "are quantized" if self.pools else "carry gradients (call the model under torch.no_grad())"
            raise UnsupportedCacheError(
                f"entries of this layer {why}, and cannot be kept in host memory; leave out offload"
            )
        self.host = HostMemory(self._keys.device, courier)
        self._keys, self._values = self.host.home(self._keys), self.host.home(self._values)

    def from_host(self) -> None:
        """Move keys and values back to the device, if they lie in host memory."""
        if self.host is not None:
            self._keys, self._values = self.host.abroad(self._keys), self.host.abroad(self._values)
            self.host = None

    def fetched(self, entries: Tensor) -> Fetch:
        """Begin to copy entries from host memory to the device, where ``[B, Hkv, n, D]`` arrive.

        Args:
            entries: int64 ``[B, H or 1, n]``, which of the K entries of each row of the batch.
        """
        assert self.host is not None
        shape = entries.shape[0], self._keys.shape[1], entries.shape[-1]
        return self.host.fetch((self._keys, self._values), self.places(entries), shape)

    def stage(self, answer: Selection, number: int, readable: Tensor | None) -> None:
        """Begin to copy what the next decode step reads from host memory to the device; see `Staged`."""
        assert self.host is not None
        self.host.staged = Staged(answer, number, readable, self.fetched(answer.indices))

    def entries(self) -> tuple[Tensor, Tensor]:
        """Return `slots` and `valid`, ``[R, H or 1, K]`` each, even while all columns are held."""
        if self.slots is not None and self.valid is not None:
            return self.slots, self.valid
        everything = Selection.all(self._keys.shape[0], self.columns, self.place)
        return everything.indices, everything.valid

    def held_columns(self) -> Tensor:
        """Return which columns are held, bool ``[R, H or 1, S]``."""
        slots, valid = self.entries()
        held = torch.zeros(*slots.shape[:2], self.columns + 1, dtype=torch.bool, device=slots.device)
        # Padding may name any column, so it is written to one beyond the last, which is cut off.
        return held.scatter_(-1, torch.where(valid, slots, self.columns), True)[..., :-1]

    def selection(self) -> Selection:
        """Return the columns that are held for R rows, in ascending order, with their precision."""
        slots, valid = self.entries()
        if not self.pools:
            if self.ragged:  # not in order: columns of a later image may follow padding
                return Selection.from_mask(self.held_columns())
            return Selection.trusted(slots, valid, self.columns)
        bits = self._bits().expand(*slots.shape[:2], -1)  # [R, H or 1, K]
        by_column = torch.full(
            (*slots.shape[:2], self.columns + 1), OWN_BITS, dtype=torch.uint8, device=slots.device
        )
        by_column.scatter_(-1, torch.where(valid, slots, self.columns), bits)
        return Selection.from_mask(self.held_columns(), by_column[..., :-1])

    def _bits(self) -> Tensor:
        """Return the bits of each entry, uint8 ``[K]``."""
        widths = [(pool.bits, pool.width) for pool in self.pools] + [(OWN_BITS, self.own)]
        return torch.cat(
            [torch.full((n,), bits, dtype=torch.uint8, device=self._keys.device) for bits, n in widths]
        )

    @property
    def _tensors(self) -> list[Tensor]:
        """All tensors that hold keys and values, quantized or not."""
        own = [self._keys, self._values] if self.own else []
        return own + [tensor for pool in self.pools for tensor in pool.tensors]

    @property
    def bytes_held(self) -> int:
        """Bytes of the keys and values that are held, padding of ragged batches included.

        Quantized entries count as their codes and group bounds.
        """
        return sum(tensor.nbytes for tensor in self._tensors) if self.is_filled else 0

    @property
    def bytes_full(self) -> int:
        """Bytes of keys and values that stock transformers would hold, for each row of the batch."""
        return self._bytes_of(self.columns) * self.copies if self.is_filled else 0

    @property
    def bytes_read(self) -> int:
        """Bytes of the dequantized copy that one call reads, for R rows; 0 if nothing is quantized."""
        return self._bytes_of(self.width) if self.pools else 0

    def _bytes_of(self, entries: int) -> int:
        """Return the bytes of a number of entries per row and KV head, in the layer's own dtype."""
        shapes = ((tensor.shape, tensor.element_size()) for tensor in (self._keys, self._values))
        return entries * sum(shape[0] * shape[1] * shape[-1] * size for shape, size in shapes)

    @property
    def bytes_behind(self) -> int:
        """Bytes of the buffers of keys and values: more than `bytes_held` if the tensors are only views."""
        if not self.is_filled:
            return 0
        buffers = {
            storage.data_ptr(): storage.nbytes()
            for storage in (tensor.untyped_storage() for tensor in self._tensors)
        }
        return sum(buffers.values())

    @property
    def bytes_of_bookkeeping(self) -> int:
        """Bytes of column numbers, validity flags and bias, in addition to keys and values."""
        beside = (self.slots, self.valid, self.bias)
        held = sum(tensor.nbytes for tensor in beside if tensor is not None)
        if not self.is_filled or self.own:
            return held
        return held + self._keys.element_size() + self._values.element_size()  # the placeholders
