"""KV01, KV10: text pruning that differs by head or layer, drops wrong entries, or depends on the batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvprune import CrossKVPolicy, Decision, Selection


@dataclass(frozen=True, kw_only=True)
class PrunesText(CrossKVPolicy):
    """Keeps all image tokens, and drops the first real text entry of samples that have several."""

    name = "prunes-text"

    @property
    def needs(self):
        return frozenset({"text_cache"})

    def select(self, view):
        return Decision()

    def select_text(self, view):
        return Selection.from_mask(self.kept(view))

    def kept(self, view):
        first = view.real & (view.real.cumsum(-1) == 1)
        kept = view.real & ~(first & (view.real.sum(-1, keepdim=True) > 1))
        return kept[:, None].expand(-1, view.heads, -1).clone()


@dataclass(frozen=True, kw_only=True)
class KeepsTextPadding(PrunesText):
    name = "keeps-text-padding"
    caught_by = ("KV01",)

    def kept(self, view):
        return torch.ones_like(super().kept(view))


@dataclass(frozen=True, kw_only=True)
class ForgetsTheLastWord(PrunesText):
    name = "forgets-the-last-word"
    caught_by = ("KV01",)

    def kept(self, view):
        kept = view.real & (view.real.sum(-1, keepdim=True) - view.real.cumsum(-1) > 0)
        kept |= view.real & (view.real.sum(-1, keepdim=True) == 1)
        return kept[:, None].expand(-1, view.heads, -1)


@dataclass(frozen=True, kw_only=True)
class UnevenText(PrunesText):
    """The first head keeps all, the others do not."""

    name = "uneven-text"
    caught_by = ("KV01",)

    def kept(self, view):
        kept = super().kept(view)
        kept[:, 0] = view.real
        return kept


@dataclass(frozen=True, kw_only=True)
class TextByLayer(PrunesText):
    """The first layer keeps all, the others do not."""

    name = "text-by-layer"
    caught_by = ("KV01",)

    def select_text(self, view):
        return None if view.rank == 2 else super().select_text(view)


@dataclass(frozen=True, kw_only=True)
class TextByBatch(PrunesText):
    """Keeps half of the entries that the batch has, padding included."""

    name = "text-by-batch"
    caught_by = ("KV10",)

    def kept(self, view):
        place = view.real.sum(-1, keepdim=True) - view.real.cumsum(-1)
        return (view.real & (place < (view.entries + 1) // 2))[:, None]
