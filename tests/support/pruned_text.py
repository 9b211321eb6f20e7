"""A policy that prunes text, and conversations of two turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

import kvprune
from kvprune import Selection

__all__ = ["SomeText", "turns"]


@dataclass(frozen=True, kw_only=True)
class SomeText(kvprune.CrossKVPolicy):
    """Keeps some text of each sample, the one with the largest keys, and half of what decoding sees."""

    name = "some-text"

    text_keep: float = 0.5
    by_head: bool = True
    cross: bool = True
    wrong: Literal[
        "", "uneven heads", "uneven layers", "padding", "last", "shape", "type", "bits", "raises"
    ] = ""

    @property
    def needs(self):
        return frozenset({"text_cache"})

    def select(self, view):
        if not self.cross:
            return kvprune.Decision()
        strata = view.decode_strata
        limit = kvprune.scoring.limits(kvprune.Budget(keep_ratio=0.5), strata)
        return kvprune.Decision(
            cache=Selection.from_mask(
                kvprune.scoring.keep_top(view.values.norm(dim=-1), strata, limit, view.visibility)
            )
        )

    def select_text(self, view):
        scores = view.keys.norm(dim=-1) + 0.01 * view.rank
        if not self.by_head:
            scores = scores.mean(1, keepdim=True)
        kept = torch.zeros_like(scores, dtype=torch.bool)
        for sample in range(view.batch):
            real = view.real[sample].nonzero().flatten()
            count = max(1, round(self.text_keep * len(real)))
            for head in range(scores.shape[1]):
                order = scores[sample, head, real].argsort(descending=True).tolist()
                last = int(view.entries - view.rows + view.last_row[sample])
                best = [int(real[i]) for i in order if int(real[i]) != last][: count - 1]
                kept[sample, head, [*best, last]] = True
        return self._spoil(kept, view)

    def _spoil(self, kept, view):
        if self.wrong == "uneven heads":
            kept[:, 0] = view.real
        elif self.wrong == "uneven layers" and view.rank == 2:
            return None
        elif self.wrong == "padding":
            kept = torch.ones_like(kept)
        elif self.wrong == "last":
            kept = view.real[:, None].clone()
            kept[..., -1] = False
        elif self.wrong == "shape":
            return Selection.from_mask(kept[..., 1:])
        elif self.wrong == "bits":
            chosen = Selection.from_mask(kept)
            bits = torch.full_like(chosen.indices, 8, dtype=torch.uint8)
            return Selection.trusted(chosen.indices, chosen.valid, chosen.columns, bits=bits)
        elif self.wrong == "type":
            return kept
        elif self.wrong == "raises":
            raise ZeroDivisionError("no")
        return Selection.from_mask(kept)


def turns(whole, split, images):
    """The inputs of two turns; the second one brings the images after the first ``images``."""
    text, image = (
        ("input_ids", "attention_mask", "cross_attention_mask"),
        ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"),
    )
    first = {k: whole[k][:, :split] for k in text} | {k: whole[k][:, :images] for k in image}
    first["cross_attention_mask"] = first["cross_attention_mask"][:, :, :images]
    second = {k: whole[k] for k in text}
    if whole["pixel_values"].shape[1] > images:
        second |= {k: whole[k][:, images:] for k in image}
    return first, second
