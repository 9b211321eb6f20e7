"""`lossless`: drops only what decoding cannot see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvprune import CrossKVPolicy, Decision, LayerView


@dataclass(frozen=True, kw_only=True)
class Lossless(CrossKVPolicy):
    """Evict, after prefill, the columns that decoding cannot see, and change nothing else (KV08).

    Those are padding tiles (a one-tile image fills a quarter of the four tiles that are stored for it) and
    earlier images of an interleaved chat. Every other policy but `full` does the same on top of what it
    selects. In a batch that mixes samples with and without an image, the latter keep everything, because
    stock transformers lets their rows attend to everything.
    """

    name: ClassVar[str] = "lossless"
    version: ClassVar[int] = 1
    cost: ClassVar[str] = "one gather of keys and values per layer"

    def select(self, view: LayerView) -> Decision:
        """Decide nothing: what decoding cannot see is evicted anyway."""
        return Decision()
