"""`full`: the reference that everything is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvprune import CrossKVPolicy, Decision, LayerView, Selection


@dataclass(frozen=True, kw_only=True)
class Full(CrossKVPolicy):
    """Keep every column, padding tiles included: bit-identical to the untouched model (KV07)."""

    name: ClassVar[str] = "full"
    version: ClassVar[int] = 1
    cost: ClassVar[str] = "none"

    def select(self, view: LayerView) -> Decision:
        """Select all columns by name, so that not even invisible ones are evicted."""
        batch, _, columns, _ = view.keys.shape
        return Decision(cache=Selection.all(batch, columns, view.keys.device))
