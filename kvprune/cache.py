"""The cache layer that holds kept cross-attention keys and values, and everything that must move with them.

State has one owner. Keys, values, the columns they came from and their validity live in one object inside
the model's ordinary cache, so whatever transformers does to a cache (reorder for beams, expand, select,
reset, deep copy, hand back in the next turn) happens to all of them together (KV11).

Beams and return sequences of one sample see one image. Their rows are held once: R rows stand for
B = R x copies rows of the batch, each ``copies`` in a row. `kvprune.caches` decides which cache may hold us.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from kvprune.merging import Merge, merge_heads
from kvprune.selection import Selection

__all__ = ["CrossKVLayer", "Twins"]


class Twins:
    """How many consecutive rows of the batch are held as one; shared by the layers of one prefill.

    Args:
        copies: Rows of the batch for each row that is held, at least 1.
    """

    def __init__(self, copies: int = 1) -> None:
        self.copies = copies
        self._asked: tuple[Tensor, int] | None = None
        self._answer = True

    def stay(self, beam_idx: Tensor) -> bool:
        """Whether a reordering moves rows only among copies of the same sample, as beam search does.

        Asks the device once for all layers that are reordered alike.
        """
        if self.copies == 1:
            return False
        if self._asked is None or self._asked[0] is not beam_idx or self._asked[1] != beam_idx._version:
            places = torch.arange(len(beam_idx), device=beam_idx.device)
            self._answer = torch.equal(beam_idx // self.copies, places // self.copies)
            self._asked = beam_idx, beam_idx._version
        return self._answer


class CrossKVLayer(DynamicLayer):
    """Kept keys and values of one cross-attention layer.

    Attributes:
        keys, values: ``[R, Hkv, K, D]``, R being the batch B divided by `copies`.
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
            adopted.keys, adopted.values, adopted.columns = keys, values, keys.shape[-2]
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
        return self.keys.shape[-2] if self.is_filled else 0

    def held_columns(self) -> Tensor:
        """Return which columns are held, bool ``[R, H or 1, S]``."""
        slots, _ = self.entries()
        held = torch.zeros(*slots.shape[:2], self.columns, dtype=torch.bool, device=slots.device)
        return held.scatter_(-1, slots, True)  # padding repeats a column that is held

    @property
    def bytes_held(self) -> int:
        """Bytes of the keys and values that are held, padding of ragged batches included."""
        return self.keys.nbytes + self.values.nbytes if self.is_filled else 0

    @property
    def bytes_full(self) -> int:
        """Bytes of keys and values that stock transformers would hold, for each row of the batch."""
        return self.bytes_held // self.width * self.columns * self.copies if self.is_filled else 0

    @property
    def bytes_behind(self) -> int:
        """Bytes of memory behind the keys and values: more than `bytes_held` if they are views of more."""
        buffers = {
            storage.data_ptr(): storage.nbytes()
            for storage in (tensor.untyped_storage() for tensor in (self.keys, self.values))
        }
        return sum(buffers.values()) if self.is_filled else 0

    @property
    def bytes_of_bookkeeping(self) -> int:
        """Bytes of the column numbers, validity flags and bias beside the keys and values."""
        beside = (self.slots, self.valid, self.bias)
        return sum(tensor.nbytes for tensor in beside if tensor is not None)

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
        if self.is_filled:
            keys = self.keys = torch.cat([self.keys, key_states], dim=-2)
            values = self.values = torch.cat([self.values, value_states], dim=-2)
        else:  # one copy, as in stock, whose concatenation also makes the projections contiguous
            keys, values = key_states.contiguous(), value_states.contiguous()
            self.keys, self.values = keys, values
            if self.copies > 1:  # cloned: a view would keep the rows alive that it leaves out
                self.keys, self.values = keys[:: self.copies].clone(), values[:: self.copies].clone()
        self.columns += columns
        if expected is not None:
            self.slots, self.valid = expected
            self.bias = self.expected_bias(self.slots.shape[-1])
            self.ragged = self.ragged or (arriving is not None and arriving.is_ragged)
        self._announced = None
        return keys, values

    def retain(self, kept: Tensor, merge: Merge | None = None) -> None:
        """Drop what is not kept, and free its memory; what is merged lives on in what is kept.

        Args:
            kept: bool ``[R, H or 1, K]`` over the entries that are held now.
            merge: Over the same entries, the shape of ``kept``. Where it is given, entries that only pad are
                not kept.
        """
        if self.valid is not None:
            kept = kept & self.valid
        if merge is None and bool(kept.all()):
            return
        positions = Selection.from_mask(kept)
        slots, _ = self.entries()
        heads, entries = positions.indices.shape[1:]
        if merge is None:
            index = positions.indices[..., None].expand(-1, self.keys.shape[1], -1, self.keys.shape[-1])
            self.keys = self.keys.gather(-2, index)
            self.values = self.values.gather(-2, index[..., : self.values.shape[-1]])
        else:
            self.keys = merge_heads(self.keys, merge, entries, renormalize=merge.renormalize_keys)
            self.values = merge_heads(self.values, merge, entries)
        self.slots = slots.expand(-1, heads, -1).gather(-1, positions.indices)
        self.valid, self.ragged = positions.valid, positions.is_ragged
        if self.bias is not None:
            self.bias = self.bias.expand(-1, heads, -1).gather(-1, positions.indices)
        if merge is not None and merge.size_bias:
            dtype = torch.float64 if self.keys.dtype == torch.float64 else torch.float32
            # Entries that have a bias already came earlier and take no members, so their logarithm is 0.
            sizes = merge.members(entries).clamp(min=1).to(dtype).log()
            self.bias = sizes if self.bias is None else self.bias + sizes

    def spread(self) -> tuple[Tensor, Tensor]:
        """Return keys and values for each row of the batch, ``[B, Hkv, K, D]``.

        Without a copy if no rows are held as one, or if all of them are (one sample with its beams);
        otherwise a copy that lives as long as the caller holds it.
        """
        return self._spread(self.keys), self._spread(self.values)

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
            self.keys, self.values = self.keys.to(dtype), self.values.to(dtype)
        self.dtype, self.device = self.keys.dtype, self.keys.device

    def _over_rows(self, move: Callable[[Tensor], Tensor]) -> None:
        self.keys, self.values = move(self.keys), move(self.values)
        if self.slots is not None and self.valid is not None:
            self.slots, self.valid = move(self.slots), move(self.valid)
        if self.bias is not None:
            self.bias = move(self.bias)

    def entries(self) -> tuple[Tensor, Tensor]:
        """Return the column and the validity of each entry, ``[R, H or 1, K]``, also if all are held."""
        if self.slots is not None and self.valid is not None:
            return self.slots, self.valid
        everything = Selection.all(self.keys.shape[0], self.columns, self.keys.device)
        return everything.indices, everything.valid
