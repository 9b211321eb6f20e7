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

from kvprune.cache.copies import Twins
from kvprune.cache.pools import Part, Pool, gather_entries, join_parts, masks_by_bits
from kvprune.cache.quantization import QUANTIZED_BITS
from kvprune.errors import SelectionError, UnsupportedCacheError
from kvprune.tokens.merging import Merge, merge_heads
from kvprune.tokens.packing import pack_left
from kvprune.tokens.precision import accumulation_dtype
from kvprune.tokens.selection import OWN_BITS, Selection

__all__ = ["CrossKVLayer"]


class CrossKVLayer(DynamicLayer):
    """Kept keys and values of one cross-attention layer.

    Attributes:
        keys, values: ``[R, Hkv, K', D]``, R being the batch B divided by `copies`: entries in the own dtype.
            Where all entries are quantized, a view of one number with K' = 1 stands for them, because
            Mllama skips a layer whose keys are empty.
        pools: Quantized entries; the K entries are those of the pools in order, and then these K'.
        columns: Columns seen so far, S: what stock transformers would hold.
        slots: int64 ``[R, H or 1, K]``, the column each entry came from; None while all S are held.
        valid: bool, same shape; false where an entry only pads a ragged batch. None while ``slots`` is None.
        bias: ``[R, H or 1, K]``, what decoding adds to the logits of each entry; None while that is nothing.
        ragged: Whether some entry may be invalid, known without asking the device.
        twins: Which rows of the batch are held as one.
    """

    # Shapes do not change while decoding, and nothing is read from the device.
    is_compileable = True

    # Optional in the base class; here they are read only once they are filled.
    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.pools: tuple[Pool, ...] = ()
        self._stands_in = True  # keys and values are no entries
        self.columns = 0
        self.slots: Tensor | None = None
        self.valid: Tensor | None = None
        self.bias: Tensor | None = None
        self.ragged = False
        self.twins = Twins()
        self._announced: Selection | None = None

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

    @property
    def is_filled(self) -> bool:
        """Whether anything is held."""
        return self.columns > 0

    @property
    def copies(self) -> int:
        """Consecutive rows of the batch for which each row that is held stands."""
        return self.twins.copies

    @property
    def width(self) -> int:
        """Entries held per row and KV head, K."""
        return sum(self.widths.values())

    @property
    def widths(self) -> dict[int, int]:
        """Entries held per row and KV head by their bits, 16 standing for the own dtype."""
        if not self.is_filled:
            return {}
        widths = {OWN_BITS: self.own} if self.own else {}
        return widths | {pool.bits: pool.width for pool in self.pools}

    @property
    def own(self) -> int:
        """Entries held in the own dtype per row and KV head, K'."""
        return 0 if self._stands_in else self.keys.shape[-2]

    @property
    def is_readable(self) -> bool:
        """Whether attention can read keys and values as they are: nothing is quantized, no rows are one."""
        return self.copies == 1 and not self.pools

    def held_columns(self) -> Tensor:
        """Return which columns are held, bool ``[R, H or 1, S]``."""
        slots, valid = self.entries()
        held = torch.zeros(*slots.shape[:2], self.columns + 1, dtype=torch.bool, device=slots.device)
        # Padding may name any column; it goes to one beyond the last.
        return held.scatter_(-1, torch.where(valid, slots, self.columns), True)[..., :-1]

    def selection(self) -> Selection:
        """Return which columns are held for R rows, in order of columns, and in which precision."""
        slots, valid = self.entries()
        if not self.pools:
            if self.ragged:  # where an image came later, padding lies before its columns
                return Selection.from_mask(self.held_columns())
            return Selection.trusted(slots, valid, self.columns)
        bits = self._bits().expand(*slots.shape[:2], -1)
        by_column = torch.full(
            (*slots.shape[:2], self.columns + 1), OWN_BITS, dtype=torch.uint8, device=slots.device
        )
        by_column.scatter_(-1, torch.where(valid, slots, self.columns), bits)
        return Selection.from_mask(self.held_columns(), by_column[..., :-1])

    def _bits(self) -> Tensor:
        """Return the bits of each entry, uint8 ``[K]``."""
        widths = [(pool.bits, pool.width) for pool in self.pools] + [(OWN_BITS, self.own)]
        return torch.cat(
            [torch.full((n,), bits, dtype=torch.uint8, device=self.keys.device) for bits, n in widths]
        )

    @property
    def _tensors(self) -> list[Tensor]:
        """All keys and values that are held, in whichever form."""
        own = [self.keys, self.values] if self.own else []
        return own + [tensor for pool in self.pools for tensor in pool.tensors]

    @property
    def bytes_held(self) -> int:
        """Bytes of the keys and values that are held, padding of ragged batches included.

        Of quantized entries, these are their codes and the ends of their groups.
        """
        return sum(tensor.nbytes for tensor in self._tensors) if self.is_filled else 0

    @property
    def bytes_full(self) -> int:
        """Bytes of keys and values that stock transformers would hold, for each row of the batch."""
        return self._bytes_of(self.columns) * self.copies if self.is_filled else 0

    @property
    def bytes_read(self) -> int:
        """Bytes of the copy in the own dtype that one call reads where something is quantized, by R rows."""
        return self._bytes_of(self.width) if self.pools else 0

    def _bytes_of(self, entries: int) -> int:
        """Return the bytes of so many entries per row and KV head in the own dtype."""
        shapes = ((tensor.shape, tensor.element_size()) for tensor in (self.keys, self.values))
        return entries * sum(shape[0] * shape[1] * shape[-1] * size for shape, size in shapes)

    @property
    def bytes_behind(self) -> int:
        """Bytes of memory behind the keys and values: more than `bytes_held` if they are views of more."""
        if not self.is_filled:
            return 0
        buffers = {
            storage.data_ptr(): storage.nbytes()
            for storage in (tensor.untyped_storage() for tensor in self._tensors)
        }
        return sum(buffers.values())

    @property
    def bytes_of_bookkeeping(self) -> int:
        """Bytes of the column numbers, validity flags and bias beside the keys and values."""
        beside = (self.slots, self.valid, self.bias)
        held = sum(tensor.nbytes for tensor in beside if tensor is not None)
        if not self.is_filled or self.own:
            return held
        return held + self.keys.element_size() + self.values.element_size()  # what stands for no entry

    def announce(self, arriving: Selection | None, twins: Twins | None = None) -> None:
        """Say what the next `update` brings.

        Args:
            arriving: Which of the new columns, for each row that will be held; None means all of them.
            twins: Which of the batch's rows are equal, so that one of each may be held. A layer that is
                filled already takes them only if it holds the same ones as one; else it holds all rows.
        """
        self._announced = arriving
        if not self.is_filled:
            self.twins = twins or Twins()

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

    def expected_bias(self, entries: int) -> Tensor | None:
        """Return the bias once there are ``entries`` entries: those that come have none."""
        if self.bias is None:
            return None
        return torch.nn.functional.pad(self.bias, (0, entries - self.bias.shape[-1]))

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
        arriving = self._announced
        columns = key_states.shape[-2] if arriving is None else arriving.columns
        expected = self.expected(columns)
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
        self.columns += columns
        if expected is not None:
            self.slots, self.valid = expected
            self.bias = self.expected_bias(self.slots.shape[-1])
            self.ragged = self.ragged or (arriving is not None and arriving.is_ragged)
        self._announced = None
        return keys, values

    def retain(self, kept: Tensor, merge: Merge | None = None, bits: Tensor | None = None) -> None:
        """Drop what is not kept, and free its memory; what is merged lives on in what is kept.

        Args:
            kept: bool ``[R, H or 1, K]`` over the entries that are held now.
            merge: Over the same entries, the shape of ``kept``. Where it is given, entries that only pad are
                not kept.
            bits: uint8, the shape of ``kept``, the precision in which each of them is held from now on.
                Quantized entries stay as they are, whatever it says of them.

        Raises:
            SelectionError: If a row keeps nothing (KV03).
            QuantizationError: If something that is to be quantized is not finite.
            UnsupportedCacheError: If entries would be both merged and quantized.
        """
        if self.valid is not None:
            kept = kept & self.valid
        if merge is not None:
            if self.pools:
                raise UnsupportedCacheError(
                    "entries of this cache are quantized, and a later decision merges entries; a cache does "
                    "one of the two: start with an empty one"
                )
            self._merge(kept, merge)
            return
        slots, _ = self.entries()
        heads = max(slots.shape[1], kept.shape[1])
        slots, kept = (tensor.expand(-1, heads, -1) for tensor in (slots, kept))
        quantized = self.width - self.own
        quantize = masks_by_bits(kept[..., quantized:], None if bits is None else bits[..., quantized:])
        if bool(kept.all()) and not quantize:
            return
        if not bool(kept.any(-1).all()):
            raise SelectionError("KV03: a selection keeps at least one token per row; a row keeps none")
        parts, own = self._keep_pools(kept), kept[..., quantized:]
        for width, chosen in quantize.items():
            place, valid = pack_left(chosen)
            parts.append(Part(Pool.of(self.keys, self.values, place, width), place + quantized, valid))
            own = own & ~chosen
        place, valid = pack_left(own)
        self._hold(gather_entries(self.keys, place), gather_entries(self.values, place))
        joined = [
            join_parts(same) for bits in QUANTIZED_BITS if (same := [p for p in parts if p.bits == bits])
        ]
        self.pools = tuple(part.pool for part in joined)
        places = torch.cat([*(part.places for part in joined), place + quantized], -1)
        self.slots = slots.gather(-1, places)
        self.valid = torch.cat([*(part.valid for part in joined), valid], -1)
        self.ragged = not bool(self.valid.all())
        if self.bias is not None:
            self.bias = self.bias.expand(-1, heads, -1).gather(-1, places)

    def _keep_pools(self, kept: Tensor) -> list[Part]:
        """Return what is kept of the pools."""
        parts, first = [], 0
        for pool in self.pools:
            place, valid = pack_left(kept[..., first : first + pool.width])
            if place.shape[-1]:
                parts.append(Part(pool.at(place), place + first, valid))
            first += pool.width
        return parts

    def _merge(self, kept: Tensor, merge: Merge) -> None:
        """Let what is dropped live on in what is kept."""
        positions = Selection.from_mask(kept)
        slots, _ = self.entries()
        heads, entries = positions.indices.shape[1:]
        self._hold(
            merge_heads(self.keys, merge, entries, renormalize=merge.renormalize_keys),
            merge_heads(self.values, merge, entries),
        )
        self.slots = slots.expand(-1, heads, -1).gather(-1, positions.indices)
        self.valid, self.ragged = positions.valid, positions.is_ragged
        if self.bias is not None:
            self.bias = self.bias.expand(-1, heads, -1).gather(-1, positions.indices)
        if merge.size_bias:
            dtype = accumulation_dtype(self.keys)
            # Entries that have a bias already came earlier and take no members, so their logarithm is 0.
            sizes = merge.members(entries).clamp(min=1).to(dtype).log()
            self.bias = sizes if self.bias is None else self.bias + sizes

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
        self.columns, self.slots, self.valid, self.ragged, self._announced = 0, None, None, False, None
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

    def entries(self) -> tuple[Tensor, Tensor]:
        """Return the column and the validity of each entry, ``[R, H or 1, K]``, also if all are held."""
        if self.slots is not None and self.valid is not None:
            return self.slots, self.valid
        everything = Selection.all(self.keys.shape[0], self.columns, self.keys.device)
        return everything.indices, everything.valid
