"""What a policy wants at one cross-attention layer."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvprune.errors import SelectionError
from kvprune.tokens.selection import Selection

__all__ = ["Decision"]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a policy wants at one cross-attention layer; an empty one changes nothing.

    Args:
        cache: Columns of this layer's view that its cache keeps for decoding, and in which precision; None
            leaves all columns that decoding can see.
        onward: Columns of this layer's view that later cross-attention layers still receive: they project,
            attend to and store only these. None leaves them as they are. The heads of different layers do
            not correspond, so this one is shared by heads (second axis 1).
        note: What a user should know about the decision; it becomes a warning of the report, each text once.

    A selection that merges lets dropped columns live on in kept ones: in ``cache`` as sums of keys and of
    values, in ``onward`` as sums of the features from which later layers make their keys and values.

    Raises:
        SelectionError: If ``onward`` differs by head or states bits, or the note is no text.
    """

    cache: Selection | None = None
    onward: Selection | None = None
    note: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.note, str):
            raise SelectionError(f"the note of a decision is text, got {type(self.note).__name__}")
        if self.onward is not None and self.onward.indices.shape[1] != 1:
            raise SelectionError(
                "KV01: what later layers receive is shared by heads, indices [B, 1, K], "
                f"got {list(self.onward.indices.shape)}"
            )
        if self.onward is not None and self.onward.bits is not None:
            raise SelectionError(
                "KV01: bits say how a cache holds entries, and features that go onward are not cached; "
                f"got onward={self.onward!r}; state bits in Decision(cache=...)"
            )
