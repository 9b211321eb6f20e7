"""A policy's answer at one cross-attention layer (`Decision`): what to cache, what to pass on."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvprune.errors import SelectionError
from kvprune.tokens.replacement import Replacement
from kvprune.tokens.selection import Selection

__all__ = ["Decision"]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A policy's answer at one cross-attention layer. An empty decision changes nothing.

    Args:
        cache: Columns of this layer's view that its cache keeps for decoding, and their precision. None keeps
            every column that decoding can see.
        onward: Columns of this layer's view that later cross-attention layers receive: they project, attend
            to and store only these. None passes on all columns. Heads of different layers do not correspond,
            so all heads share this selection (second axis 1). A `Replacement` passes on new tokens in the
            place of some columns, and drops all others.
        note: A remark for the user, for example that the budget could not be met. It becomes a warning in the
            report; equal notes are shown once.

    If a selection has a merge, dropped columns are added to kept ones: in ``cache`` as sums of keys and of
    values, in ``onward`` as sums of the features from which later layers compute keys and values.

    Raises:
        SelectionError: If ``onward`` differs by head or has bits, or the note is not a string.
    """

    cache: Selection | None = None
    onward: Selection | Replacement | None = None
    note: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.note, str):
            raise SelectionError(f"the note of a decision is a string, got {type(self.note).__name__}")
        received = self.received
        if received is not None and received.indices.shape[1] != 1:
            raise SelectionError(
                "KV01: all heads share the columns that later layers receive, so indices are [B, 1, K], "
                f"got {list(received.indices.shape)}"
            )
        if received is not None and received.bits is not None:
            raise SelectionError(
                "KV01: bits are the precision of cached entries, but features passed onward are not cached; "
                f"got onward={self.onward!r}; give bits in Decision(cache=...)"
            )

    @property
    def received(self) -> Selection | None:
        """The columns that later layers receive; of new tokens, their places. None for all columns."""
        return self.onward.places if isinstance(self.onward, Replacement) else self.onward
