"""`lossless`: drops only what decoding cannot see."""

from __future__ import annotations

from dataclasses import dataclass

from kvprune import CrossKVPolicy, Decision, LayerView


@dataclass(frozen=True, kw_only=True)
class Lossless(CrossKVPolicy):
    """Evict, after prefill, the columns that decoding cannot see, and change nothing else (KV08).

    These columns are padding tiles (a one-tile image fills a quarter of the four tiles that are stored for
    it) and earlier images of an interleaved chat. Every other policy except `full` evicts them as well. In a
    batch of samples with and without an image, those without keep everything, because stock transformers lets
    their rows attend to everything.
    """

    name = "lossless"
    version = 1

    def select(self, view: LayerView) -> Decision:
        """Decide nothing: what decoding cannot see is evicted anyway."""
        return Decision()

    cost = "one gather of keys and values per layer"
