"""Which columns of a cross-attention cache are kept (`Selection`), as indices and as a mask.

A selection is checked when it is made, so code that receives one may rely on the invariants KV01 and KV03.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from kvprune.errors import SelectionError
from kvprune.tokens.merging import Merge
from kvprune.tokens.packing import pack_left

__all__ = ["BITS", "OWN_BITS", "Selection"]

OWN_BITS = 16
"""Stands for the cache's own dtype, whichever that is."""

BITS = (OWN_BITS, 8, 4, 2)
"""Precisions in which an entry may be stored."""


@dataclass(frozen=True, eq=False)
class Selection:
    """The columns of a cross-attention cache that are kept.

    Args:
        indices: int64 ``[B, H or 1, K]``, strictly increasing columns of the unpruned cache, H being the
            number of KV heads. If the second axis is 1, all heads share one row.
        valid: bool, same shape. Ragged batches are padded to the longest row by repeating the last index of
            each row. Padding is not valid, and valid entries come first.
        columns: Width S of the unpruned cache, in tokens.
        merge: How dropped columns are merged into kept ones; None without merging. `kvprune.tokens.buckets`
            makes it.
        bits: uint8, same shape, bits per number of each entry: 16 stands for the cache's own dtype; 8, 4 and
            2 are quantized (`kvprune.cache.quantization`). Padding repeats the bits of the last index. None
            if all entries are stored in the cache's own dtype.

    Raises:
        SelectionError: If any of this does not hold (KV01), or a row keeps nothing (KV03). A merge is checked
            later, together with the decision (KV15).

    Example:
        >>> selection = Selection.from_mask(torch.tensor([[[True, False, True]]]))
        >>> selection.indices.tolist()
        [[[0, 2]]]
    """

    indices: Tensor
    valid: Tensor
    columns: int
    merge: Merge | None = None
    bits: Tensor | None = None

    def __post_init__(self) -> None:
        self._check_tensors()
        self._check_contents()
        self._check_bits()

    def _check_tensors(self) -> None:
        """Check types, shapes and devices of indices and valid, without a host transfer."""
        indices, valid = self.indices, self.valid
        if not isinstance(indices, Tensor) or not isinstance(valid, Tensor):
            raise SelectionError(
                "KV01: indices and valid are tensors, "
                f"got {type(indices).__name__} and {type(valid).__name__}"
            )
        if indices.dtype != torch.int64 or indices.ndim != 3:
            raise SelectionError(
                f"KV01: indices are int64 [B, H or 1, K], got {indices.dtype} {list(indices.shape)}"
            )
        if valid.dtype != torch.bool or valid.shape != indices.shape:
            raise SelectionError(
                f"KV01: valid is bool with the shape of indices {list(indices.shape)}, "
                f"got {valid.dtype} {list(valid.shape)}"
            )
        if valid.device != indices.device:
            raise SelectionError(
                f"KV01: indices are on {indices.device}, but valid is on {valid.device}; "
                "both must be on one device"
            )
        if indices.shape[-1] == 0:
            raise SelectionError("KV03: a selection keeps at least one token per row, got K = 0")

    def _check_contents(self) -> None:
        """Check the values of indices and valid, with one host transfer for all questions."""
        indices, valid = self.indices, self.valid
        steps, valid_steps = indices.diff(dim=-1), valid[..., 1:]  # [B, H or 1, K - 1]
        empty, out_of_range, unordered, holes, loose_padding = torch.stack(
            [
                ~valid.any(-1).all(),
                ((indices < 0) | (indices >= self.columns)).any(),
                ((steps <= 0) & valid_steps).any(),
                (valid_steps & ~valid[..., :-1]).any(),
                ((steps != 0) & ~valid_steps).any(),
            ]
        ).tolist()
        if empty:
            raise SelectionError("KV03: a selection keeps at least one token per row; a row keeps none")
        if out_of_range:
            raise SelectionError(
                f"KV01: indices lie in [0, {self.columns}), "
                f"got values from {int(indices.min())} to {int(indices.max())}"
            )
        if holes:
            raise SelectionError("KV01: valid entries come first in each row, got padding before one")
        if unordered:
            raise SelectionError("KV01: indices are strictly increasing in each row; a row is not")
        if loose_padding:
            raise SelectionError("KV01: padding repeats the last index of its row; a row does not")

    def _check_bits(self) -> None:
        bits = self.bits
        if bits is None:
            return
        if self.merge is not None:
            raise SelectionError(
                "KV01: a selection has either a merge or bits, got both; merged entries are stored in the "
                "cache's own dtype"
            )
        if not isinstance(bits, Tensor):
            raise SelectionError(f"KV01: bits are a tensor or None, got {type(bits).__name__}")
        if bits.dtype != torch.uint8 or bits.shape != self.indices.shape:
            raise SelectionError(
                f"KV01: bits are uint8 with the shape of indices {list(self.indices.shape)}, "
                f"got {bits.dtype} {list(bits.shape)}"
            )
        if bits.device != self.indices.device:
            raise SelectionError(
                f"KV01: indices are on {self.indices.device}, but bits are on {bits.device}; "
                "both must be on one device"
            )
        _require_known(bits)
        if bool(((bits[..., 1:] != bits[..., :-1]) & ~self.valid[..., 1:]).any()):
            raise SelectionError(
                "KV01: padding repeats the bits of the last index of its row; a row does not"
            )

    @classmethod
    def from_mask(cls, kept: Tensor, bits: Tensor | None = None) -> Selection:
        """Return the selection of the columns where ``kept`` is true.

        The mask is copied: changing ``kept`` later does not change the selection.

        Args:
            kept: bool ``[B, H or 1, S]``.
            bits: uint8, same shape or one that expands to it, the precision of each column (see the class).
                Its values at dropped columns are ignored.

        Raises:
            SelectionError: If a shape or dtype is wrong, a row keeps nothing, or a value is not in `BITS`.

        Example:
            >>> Selection.from_mask(torch.tensor([[[True, False, True, True]]]))
            Selection(batch=1, heads=1, kept=3, columns=4)
        """
        if not isinstance(kept, Tensor):
            raise SelectionError(f"KV01: a mask of kept columns is a tensor, got {type(kept).__name__}")
        if kept.dtype != torch.bool or kept.ndim != 3 or kept.numel() == 0:
            raise SelectionError(
                f"KV01: a mask of kept columns is bool [B, H or 1, S], got {kept.dtype} {list(kept.shape)}"
            )
        fewest, most = torch.stack(kept.sum(-1).aminmax()).tolist()
        if fewest == 0:
            raise SelectionError("KV03: a selection keeps at least one token per row; a row keeps none")
        indices, valid = pack_left(kept, most)
        chosen = None if bits is None else _bits_of_kept(bits, kept).gather(-1, indices)
        selection = cls.trusted(indices, valid, kept.shape[-1], bits=chosen)
        selection._remember(kept.clone())
        return selection

    @classmethod
    def all(cls, batch: int, columns: int, device: torch.device | str = "cpu") -> Selection:
        """Return the selection that keeps all ``columns`` columns in each of ``batch`` samples."""
        if columns < 1:
            raise SelectionError(f"KV03: a selection keeps at least one token per row, got {columns} columns")
        indices = torch.arange(columns, device=device).expand(batch, 1, columns)
        return cls.trusted(
            indices, torch.ones(1, device=device, dtype=torch.bool).expand_as(indices), columns
        )

    @classmethod
    def trusted(
        cls,
        indices: Tensor,
        valid: Tensor,
        columns: int,
        merge: Merge | None = None,
        bits: Tensor | None = None,
    ) -> Selection:
        """Return a selection that is correct by construction: skips the checks and their host transfer.

        Args:
            indices: See the class.
            valid: See the class.
            columns: See the class.
            merge: See the class.
            bits: See the class.
        """
        selection = object.__new__(cls)
        parts = {"indices": indices, "valid": valid, "columns": columns, "merge": merge, "bits": bits}
        for name, value in parts.items():
            object.__setattr__(selection, name, value)
        return selection

    def with_merge(self, merge: Merge | None) -> Selection:
        """Return the same selection with another merge (None for no merge), unchecked."""
        selection = copy.copy(self)  # the copy shares the mask, if it has been computed
        object.__setattr__(selection, "merge", merge)
        return selection

    @property
    def counts(self) -> Tensor:
        """Number of kept tokens, int64 ``[B, H or 1]``."""
        return self.valid.sum(-1)

    @property
    def is_ragged(self) -> bool:
        """Whether some row is padded (one host transfer)."""
        return not bool(self.valid.all())

    @property
    def mask(self) -> Tensor:
        """The kept columns, bool ``[B, H or 1, S]``, shared by all readers; `to_mask` returns a copy.

        The mask is stored, and computed again only after somebody has written to it or to the indices.
        """
        stored: tuple[Tensor | None, tuple[int, ...] | None] = vars(self).get("_mask", (None, None))
        mask, versions = stored
        if mask is None or versions is None or versions != _versions(self.indices, mask):
            shape = *self.indices.shape[:2], self.columns
            mask = torch.zeros(shape, dtype=torch.bool, device=self.indices.device)
            # Padding repeats a valid index, so writing True everywhere marks exactly the kept columns.
            mask.scatter_(-1, self.indices, True)
            self._remember(mask)
        return mask

    def _remember(self, mask: Tensor) -> None:
        vars(self)["_mask"] = mask, _versions(self.indices, mask)

    @property
    def is_known_full(self) -> bool:
        """Whether it is known, without a host transfer, that no row is padded."""
        return bool(vars(self).get("_known_full", False))

    @classmethod
    def full(cls, indices: Tensor, columns: int) -> Selection:
        """Return a selection without padding that is correct by construction, as `trusted`."""
        valid = torch.ones(1, 1, 1, dtype=torch.bool, device=indices.device).expand_as(indices)
        selection = cls.trusted(indices, valid, columns)
        vars(selection)["_known_full"] = True
        return selection

    def to_mask(self) -> Tensor:
        """Return the kept columns as bool ``[B, H or 1, S]``, a copy that the caller may change."""
        return self.mask.clone()

    def bits_by_column(self) -> Tensor:
        """Return the precision of each column, uint8 ``[B, H or 1, S]``; 16 for dropped columns."""
        shape = *self.indices.shape[:2], self.columns
        by_column = torch.full(shape, OWN_BITS, dtype=torch.uint8, device=self.indices.device)
        # Padding has the index and the bits of a valid entry, so writing it changes nothing.
        return by_column if self.bits is None else by_column.scatter_(-1, self.indices, self.bits)

    @property
    def quantizes(self) -> bool:
        """Whether some entry has fewer bits than the cache's own dtype (one host transfer)."""
        return self.bits is not None and bool((self.bits != OWN_BITS).any())

    def repeat(self, copies: int) -> Selection:
        """Return the selection with each row of its batch repeated, ``[B * copies, H or 1, K]``."""
        if copies == 1:
            return self
        indices, valid = (tensor.repeat_interleave(copies, dim=0) for tensor in (self.indices, self.valid))
        merge = None if self.merge is None else self.merge.repeat(copies)
        bits = None if self.bits is None else self.bits.repeat_interleave(copies, dim=0)
        return Selection.trusted(indices, valid, self.columns, merge, bits)

    def every(self, step: int) -> Selection:
        """Return the selection of every ``step``-th row of its batch: undoes `repeat`."""
        if step == 1:
            return self
        merge = None if self.merge is None else self.merge.every(step)
        bits = None if self.bits is None else self.bits[::step]
        return Selection.trusted(self.indices[::step], self.valid[::step], self.columns, merge, bits)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Selection):
            return NotImplemented
        return (
            self.columns == other.columns
            and torch.equal(self.indices, other.indices)
            and torch.equal(self.valid, other.valid)
            and (other.merge is None if self.merge is None else self.merge.equals(other.merge))
            and self._same_bits(other)
        )

    def _same_bits(self, other: Selection) -> bool:
        if self.bits is not None and other.bits is not None:
            return torch.equal(self.bits, other.bits)
        return not self.quantizes and not other.quantizes  # None and all-16 are equivalent

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        batch, heads, kept = self.indices.shape
        merged = "" if self.merge is None else ", merged"
        bits = ""
        if self.bits is not None:
            held = self.bits[self.valid].unique().tolist()
            bits = f", bits={'/'.join(str(width) for width in sorted(held, reverse=True))}"
        return f"Selection(batch={batch}, heads={heads}, kept={kept}, columns={self.columns}{merged}{bits})"


def _versions(*tensors: Tensor) -> tuple[int, ...] | None:
    """Return how often each tensor was written to; None for inference tensors, which do not count it."""
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return tuple(tensor._version for tensor in tensors)


def _require_known(bits: Tensor) -> None:
    known = torch.tensor(BITS, dtype=torch.uint8, device=bits.device)
    unknown = bits[~torch.isin(bits, known)]
    if unknown.numel():
        raise SelectionError(
            f"KV01: the bits of an entry are {', '.join(map(str, BITS[:-1]))} or {BITS[-1]} "
            f"({OWN_BITS} stands for the cache's own dtype), got {int(unknown[0])}"
        )


def _bits_of_kept(bits: Tensor, kept: Tensor) -> Tensor:
    """Check the bits of columns against the mask of kept columns, and expand them to its shape."""
    if not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or bits.ndim != 3:
        got = f"{bits.dtype} {list(bits.shape)}" if isinstance(bits, Tensor) else type(bits).__name__
        raise SelectionError(f"KV01: bits of columns are uint8 {list(kept.shape)}, got {got}")
    if any(size not in (1, whole) for size, whole in zip(bits.shape, kept.shape, strict=True)):
        raise SelectionError(f"KV01: bits of columns are {list(kept.shape)}, got {list(bits.shape)}")
    if bits.device != kept.device:
        raise SelectionError(
            f"KV01: the mask is on {kept.device}, but bits are on {bits.device}; both must be on one device"
        )
    bits = bits.expand_as(kept)
    _require_known(bits[kept])
    return bits
