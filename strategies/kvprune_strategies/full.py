"""`full`: the reference that everything is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from kvprune import CrossKVPolicy, Decision, LayerView


@dataclass(frozen=True, kw_only=True)
class Full(CrossKVPolicy):
    """Keep every column, padding tiles included: bit-identical to the untouched model (KV07)."""

    name = "full"
    version = 1
    keeps_invisible = True

    def select(self, view: LayerView) -> Decision:
        """Decide nothing, and evict nothing either."""
        return Decision()

    cost = "none"
