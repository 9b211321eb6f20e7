"""`snapkv`: attention from the end of the prompt, pooled over neighbouring tokens."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from kvprune import LayerView, ScoringPolicy, scoring
from kvprune.errors import PolicyOptionError
from kvprune.policy import Need


@dataclass(frozen=True, kw_only=True)
class SnapKV(ScoringPolicy):
    """Keep the tokens with the highest attention from a window of last text rows, pooled over neighbours.

    A token's score is the attention from the window's rows, averaged over the query heads of a KV head and
    then pooled over neighbouring tokens.

    The published runs on LongBench have a window of 32 rows and take the maximum over 7 tokens
    (preset=published). KVCache-Factory runs the same with a window of 8 (preset=kvcache-factory). The default
    of kvpress and of the published class is a window of 64 and the mean over 5 (preset=kvpress).

    Args:
        window: Number of last live rows that count; all if there are fewer. 32 covers most questions about a
            picture.
        kernel: Width of the pooling window in tokens, odd; 1 pools nothing.
        pool: Which tokens are neighbours. "1d": tokens next to each other in the cache, within one tile, its
            class token first; audio frames and text tokens, likewise. "2d": a square of kernel x kernel
            patches of the image, across the borders of its tiles; class tokens, and a text beside the image,
            keep their own score and are nobody's neighbours; models whose tokens form no grid are refused.
            "none": no pooling. The paper has "1d".
        reduction: "avg" or "max" over neighbours.
        border: What "avg" divides by where a window reaches beyond an image or, with "1d", a tile. "exists":
            the neighbours that exist. "zeros": the whole window, as if zeros were there, so tokens at a
            border score lower; the published code and kvpress do this.
    """

    window: int = 32
    kernel: int = 5
    pool: Literal["1d", "2d", "none"] = "1d"
    reduction: Literal["avg", "max"] = "avg"
    border: Literal["exists", "zeros"] = "exists"

    name = "snapkv"
    version = 3
    presets = MappingProxyType(
        {
            "published": {"window": 32, "kernel": 7, "reduction": "max"},
            "kvcache-factory": {"window": 8, "kernel": 7, "reduction": "max"},
            "kvpress": {"window": 64, "kernel": 5, "border": "zeros"},
        }
    )

    @property
    def needs(self) -> frozenset[Need]:
        """Queries, and with pool="2d" a grid: models without one are refused."""
        return frozenset({"queries", "grid"} if self.pool == "2d" else {"queries"})

    def score(self, view: LayerView) -> Tensor:
        """Return pooled attention of the window by KV head ``[B, Hkv, S]``."""
        mass = scoring.by_kv_head(view.window_mass(self.window), view.heads)  # [B, Hkv, S]
        return mass if self.pool == "none" else self._pooled(view, mass)

    def _pooled(self, view: LayerView, mass: Tensor) -> Tensor:
        """Pool the scores ``[B, Hkv, S]`` of each stratum on its own: each has a window of its own."""
        divisor = None if self.border == "exists" else self.kernel ** (1 if self.pool == "1d" else 2)
        pooled = mass
        for members in scoring.each_stratum(view.strata):  # [B, S]
            if self.pool == "1d":
                places, images = scoring.lines(view.visibility, members, view.segments)
            else:
                places, images = view.grid, view.images  # [B or 1, S, 2], [B or 1, S]
            smooth = scoring.pool_neighbours(
                mass, places, images, members, self.kernel, self.reduction, divisor
            )
            pooled = torch.where(members[:, None], smooth, pooled)
        return pooled

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise PolicyOptionError(
                f"window of policy {self.name!r} is a number of text rows, at least 1, got {self.window!r}"
            )
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise PolicyOptionError(
                f"kernel of policy {self.name!r} is an odd number of tokens, such as 3 or 5, "
                f"got {self.kernel!r}"
            )

    fidelity = "adapted"
    paper = "arXiv 2404.14469 (SnapKV)"
    deviations = """
    The window is text and the cache holds images, so there is no causal mask within the window, and no part
    of the budget keeps it. The published code stores one selection for each query head; here, as in
    KVCache-Factory (kv_head) and in AdaKV's code, a KV head has one, and its query heads are averaged before
    pooling. Pooling crosses no image, and with "1d" no tile, and leaves unseen tokens out; the published code
    has one line of tokens. At a border, the mean is over the neighbours that exist, unless border=zeros. A
    maximum makes neighbours equal, and of equal tokens the first are kept, where torch.topk makes no promise.
    If only earlier rows of a chat see an image, its window is the last of these rows.
    """
    differs = "the mean over 5 tokens, where the published runs take the maximum over 7 (preset=published)"
    checked_against = (
        "same sets as FasterDecoding/SnapKV@e216ddc, FFY0/AdaKV@efe4e2e, Zefan-Cai/KVCache-Factory@c97f9d7 "
        "and NVIDIA/kvpress@8bb29b9, each at its preset"
    )
    cost = (
        "the window's product of queries and keys in each layer that decides, and a few copies of one "
        "image's scores by KV head; a few host synchronisations for each sample and image (pool=1d: tile)"
    )
    bibtex = """
@article{snapkv2024,
  title = {{SnapKV}: {LLM} Knows What You are Looking for Before Generation},
  author = {Li, Yuhong and Huang, Yingbing and Yang, Bowen and Venkitesh, Bharat and Locatelli, Acyr and Ye,
            Hanchen and Cai, Tianle and Lewis, Patrick and Chen, Deming},
  year = {2024},
  eprint = {2404.14469},
  archivePrefix = {arXiv},
}
"""
