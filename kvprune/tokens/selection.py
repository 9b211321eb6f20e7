"""How many tokens to keep (`Budget`), which ones (`Selection`), and what follows (`Decision`).

All arithmetic on budgets is exact: ``keep_ratio=0.1`` of ten tokens is one token on every platform.
A `Selection` is checked when it is made, so whoever holds one may rely on the invariants KV01 and KV03.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvprune.errors import SelectionError
from kvprune.tokens.merging import Merge

__all__ = ["BITS", "OWN_BITS", "Selection"]

OWN_BITS = 16
"""Stands for the cache's own dtype, whatever that is."""

BITS = (OWN_BITS, 8, 4, 2)
"""Precisions in which an entry may be held."""


@dataclass(frozen=True, eq=False)
class Selection:
    """The columns of a cross-attention cache that are kept.

    Args:
        indices: int64 ``[B, H or 1, K]``, strictly increasing columns of the unpruned cache, H being the
            number of KV heads. One row serves all heads where the second axis is 1.
        valid: bool, same shape. Rows of a ragged batch are padded to the longest one by repeating their
            last index; padding is not valid, and valid entries come first.
        columns: Width S of the unpruned cache, in tokens.
        merge: How dropped columns live on in kept ones; None if none do. `kvprune.tokens.buckets` makes it.
        bits: uint8, same shape, in how many bits a number of the entry is held: 16 stands for the cache's own
            dtype, 8, 4 and 2 are quantized (`kvprune.cache.quantization`). Padding repeats those of its last
            index. None where all entries are held in the own dtype.

    Raises:
        SelectionError: If any of this does not hold (KV01), or a row keeps nothing (KV03). What a merge says
            is checked when a decision is judged (KV15).
    """

    indices: Tensor
    valid: Tensor
    columns: int
    merge: Merge | None = None
    bits: Tensor | None = None

    def __post_init__(self) -> None:
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
                f"KV01: indices are on {indices.device}, but valid is on {valid.device}; they share a device"
            )
        if indices.shape[-1] == 0:
            raise SelectionError("KV03: a selection keeps at least one token per row, got K = 0")
        steps, valid_steps = indices.diff(dim=-1), valid[..., 1:]
        # One transfer for all questions: this runs once per prefill, never in decode.
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
        self._check_bits()

    def _check_bits(self) -> None:
        bits = self.bits
        if bits is None:
            return
        if self.merge is not None:
            raise SelectionError(
                "KV01: a selection merges entries or states bits, got both; what is merged is held in the "
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
                "they share a device"
            )
        _require_known(bits)
        if bool(((bits[..., 1:] != bits[..., :-1]) & ~self.valid[..., 1:]).any()):
            raise SelectionError(
                "KV01: padding repeats the bits of the last index of its row; a row does not"
            )

    @classmethod
    def from_mask(cls, kept: Tensor, bits: Tensor | None = None) -> Selection:
        """Return the selection of the columns where ``kept`` is true.

        Args:
            kept: bool ``[B, H or 1, S]``.
            bits: uint8, same shape or one that expands to it, the precision of each column (see the class);
                what it says of columns that are not kept does not matter.

        Raises:
            SelectionError: If the shapes are others, a row keeps nothing, or the bits are none of `BITS`.
        """
        if not isinstance(kept, Tensor):
            raise SelectionError(f"KV01: a mask of kept columns is a tensor, got {type(kept).__name__}")
        if kept.dtype != torch.bool or kept.ndim != 3 or kept.numel() == 0:
            raise SelectionError(
                f"KV01: a mask of kept columns is bool [B, H or 1, S], got {kept.dtype} {list(kept.shape)}"
            )
        counts = kept.sum(-1, keepdim=True)
        fewest, width = torch.stack(counts.aminmax()).tolist()
        if fewest == 0:
            raise SelectionError("KV03: a selection keeps at least one token per row; a row keeps none")
        # A stable sort of "dropped" moves kept columns to the front and leaves them in order.
        indices = (~kept).to(torch.uint8).argsort(dim=-1, stable=True)[..., :width]
        valid = torch.arange(width, device=kept.device) < counts
        last = indices.gather(-1, (counts - 1).clamp(min=0))
        indices = torch.where(valid, indices, last)
        if bits is None:
            return cls.trusted(indices, valid, kept.shape[-1])
        chosen = _bits_of_kept(bits, kept).gather(-1, indices)
        return cls.trusted(indices, valid, kept.shape[-1], bits=chosen)

    @classmethod
    def all(cls, batch: int, columns: int, device: torch.device | str = "cpu") -> Selection:
        """Return the selection that keeps each of ``columns`` columns in each of ``batch`` samples."""
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
        """Return a selection that is right by construction, without the checks and their host transfer.

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

    @property
    def counts(self) -> Tensor:
        """Number of kept tokens, int64 ``[B, H or 1]``."""
        return self.valid.sum(-1)

    @property
    def is_ragged(self) -> bool:
        """Whether some row is padded."""
        return not bool(self.valid.all())

    def to_mask(self) -> Tensor:
        """Return the kept columns as bool ``[B, H or 1, S]``."""
        kept = torch.zeros(
            *self.indices.shape[:2], self.columns, dtype=torch.bool, device=self.indices.device
        )
        # Padding repeats a valid index, so writing True everywhere marks exactly the kept columns.
        return kept.scatter_(-1, self.indices, True)

    def bits_by_column(self) -> Tensor:
        """Return the precision of each column, uint8 ``[B, H or 1, S]``; 16 also where nothing is kept."""
        shape = *self.indices.shape[:2], self.columns
        by_column = torch.full(shape, OWN_BITS, dtype=torch.uint8, device=self.indices.device)
        # Padding repeats the bits of a valid entry with its index.
        return by_column if self.bits is None else by_column.scatter_(-1, self.indices, self.bits)

    @property
    def quantizes(self) -> bool:
        """Whether some entry is held in fewer bits than the cache's own dtype has."""
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
        return not self.quantizes and not other.quantizes  # None says what 16 everywhere says

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        batch, heads, kept = self.indices.shape
        merged = "" if self.merge is None else ", merged"
        bits = ""
        if self.bits is not None:
            held = self.bits[self.valid].unique().tolist()
            bits = f", bits={'/'.join(str(width) for width in sorted(held, reverse=True))}"
        return f"Selection(batch={batch}, heads={heads}, kept={kept}, columns={self.columns}{merged}{bits})"


def _require_known(bits: Tensor) -> None:
    known = torch.tensor(BITS, dtype=torch.uint8, device=bits.device)
    unknown = bits[~torch.isin(bits, known)]
    if unknown.numel():
        raise SelectionError(
            f"KV01: an entry is held in {', '.join(map(str, BITS[:-1]))} or {BITS[-1]} bits "
            f"({OWN_BITS} being the cache's own dtype), got {int(unknown[0])}"
        )


def _bits_of_kept(bits: Tensor, kept: Tensor) -> Tensor:
    """Check the bits of columns against a mask of kept ones, and expand them to its shape."""
    if not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or bits.ndim != 3:
        got = f"{bits.dtype} {list(bits.shape)}" if isinstance(bits, Tensor) else type(bits).__name__
        raise SelectionError(f"KV01: bits of columns are uint8 {list(kept.shape)}, got {got}")
    if any(size not in (1, whole) for size, whole in zip(bits.shape, kept.shape, strict=True)):
        raise SelectionError(f"KV01: bits of columns are {list(kept.shape)}, got {list(bits.shape)}")
    if bits.device != kept.device:
        raise SelectionError(
            f"KV01: the mask is on {kept.device}, but bits are on {bits.device}; they share a device"
        )
    bits = bits.expand_as(kept)
    _require_known(bits[kept])
    return bits
