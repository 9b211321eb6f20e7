"""New tokens that a policy puts in the place of columns (`Replacement`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvprune.errors import SelectionError
from kvprune.tokens.merging import Merge
from kvprune.tokens.reindexing import positions
from kvprune.tokens.selection import Selection

__all__ = ["Replacement", "among"]


@dataclass(frozen=True, eq=False)
class Replacement:
    """New tokens, given by their features, each in the place of one column.

    Layers project the features of the new tokens to keys and values, as they do with the encoder's own. All
    columns that are no place are dropped. A new token inherits from its place whatever the model knows about
    the column: a text row attends to token k if and only if it attends to that column, and budgets, receipts,
    masks and later selections count it under that column's number. So choose as the place of a token a column
    of the image, and of the turn, that the token speaks for.

    Args:
        features: ``[B, K, C]``, in the dtype and on the device of ``view.features``. Layers normalize and
            project them as they stand. They may carry a gradient. Those of padding may be anything.
        places: The columns that the new tokens take, ``[B, 1, K]``, without merge and bits. Samples with
            fewer tokens are padded, as in every `Selection`.

    Raises:
        SelectionError: If features and places do not fit together (KV01). Whether they fit the view is
            checked together with the decision.

    Example:
        >>> places = Selection.from_mask(torch.tensor([[[True, False, True, False]]]))
        >>> Replacement(torch.zeros(1, 2, 8), places)
        Replacement(batch=1, tokens=2, channels=8, columns=4)
    """

    features: Tensor
    places: Selection

    def __post_init__(self) -> None:
        features, places = self.features, self.places
        if not isinstance(features, Tensor) or not isinstance(places, Selection):
            raise SelectionError(
                "KV01: a replacement has a tensor of features and a Selection of places, "
                f"got {type(features).__name__} and {type(places).__name__}"
            )
        if places.indices.shape[1] != 1:
            raise SelectionError(
                "KV01: all heads share the places of new tokens, so their indices are [B, 1, K], "
                f"got {list(places.indices.shape)}"
            )
        if places.merge is not None or places.bits is not None:
            raise SelectionError(
                "KV01: places of new tokens have neither a merge nor bits; merge in the features, and "
                f"give bits in Decision(cache=...); got {places!r}"
            )
        batch, _, tokens = places.indices.shape
        if features.ndim != 3 or features.shape[:2] != (batch, tokens):
            raise SelectionError(
                f"KV01: {tokens} places for each of {batch} samples take features [{batch}, {tokens}, C], "
                f"got {list(features.shape)}; each new token has a place of its own, so there are at most as "
                f"many as columns ({places.columns})"
            )
        if not features.is_floating_point():
            raise SelectionError(
                f"KV01: features of new tokens are floating-point numbers, got {features.dtype}"
            )

    @classmethod
    def trusted(cls, features: Tensor, places: Selection) -> Replacement:
        """Return a replacement that is correct by construction: skips the checks."""
        replacement = object.__new__(cls)
        object.__setattr__(replacement, "features", features)
        object.__setattr__(replacement, "places", places)
        return replacement

    @property
    def tokens(self) -> int:
        """Number of new tokens K, padding included."""
        return self.features.shape[1]

    def repeat(self, copies: int) -> Replacement:
        """Return the replacement with each row of its batch repeated."""
        if copies == 1:
            return self
        return Replacement.trusted(self.features.repeat_interleave(copies, dim=0), self.places.repeat(copies))

    def every(self, step: int) -> Replacement:
        """Return the replacement of every ``step``-th row of its batch: undoes `repeat`."""
        return self if step == 1 else Replacement.trusted(self.features[::step], self.places.every(step))

    def moved_by(self, columns: int) -> Replacement:
        """Return the replacement with ``columns`` more columns before its own, those of earlier images."""
        places = self.places
        if not columns:
            return self
        moved = Selection.trusted(places.indices + columns, places.valid, places.columns + columns)
        return Replacement.trusted(self.features, moved)

    def with_padding(self) -> Replacement:
        """Return the replacement in which padding repeats the features of each sample's last token.

        Attention multiplies what it masks by 0, which does not make NaN harmless.
        """
        if self.places.is_known_full or not self.places.is_ragged:
            return self
        last = self.places.counts - 1  # [B, 1]
        index = torch.minimum(torch.arange(self.tokens, device=last.device), last)  # [B, K]
        index = index.to(self.features.device)[..., None].expand_as(self.features)
        return Replacement.trusted(self.features.gather(1, index), self.places)

    def __repr__(self) -> str:
        batch, tokens, channels = self.features.shape
        return (
            f"Replacement(batch={batch}, tokens={tokens}, channels={channels}, columns={self.places.columns})"
        )


def among(places: Selection, received: Selection) -> Selection:
    """Express a selection of columns as one of the new tokens in their places.

    Args:
        places: Of K new tokens, ``[B, 1, K]``.
        received: A selection of the same columns that keeps only places, with its merge.
    """
    if received.indices is places.indices and received.merge is None:
        indices = torch.arange(places.indices.shape[-1], device=places.indices.device)
        indices = torch.minimum(indices, places.counts[..., None] - 1)  # padding repeats the last one
        return Selection.trusted(indices, places.valid, places.indices.shape[-1])
    indices = positions(places).gather(-1, received.indices)  # [B, 1, kept]
    merge = received.merge
    if merge is not None:
        into = merge.into.gather(-1, places.indices)  # [B, 1, K]
        weights = merge.weights.gather(-1, places.indices)
        merge = Merge(torch.where(places.valid, into, -1), weights)
    return Selection.trusted(indices, received.valid, places.indices.shape[-1], merge)
