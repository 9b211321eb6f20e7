"""`snapkv`: what the end of the prompt looks at, smoothed over neighbouring tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvprune import LayerView, ScoringPolicy, scoring
from kvprune.errors import PolicyOptionError
from kvprune.policy import Need


@dataclass(frozen=True, kw_only=True)
class SnapKV(ScoringPolicy):
    """Keep the tokens with the highest attention from a window of last text rows, pooled over neighbours.

    Each query head adds up the attention of the window's rows and pools it over neighbouring tokens; a KV
    head averages its query heads.

    Args:
        window: Number of last live rows that count; all where there are fewer. The published code has 64 as
            default of its class and 32 in its configuration; 32 covers most questions about a picture.
        kernel: Width of the pooling window in tokens, odd; 1 pools nothing.
        pool: Which tokens are neighbours. "1d": those next to each other in the cache, within one tile, its
            class token at the head of the line. "2d": a square of kernel x kernel patches of the image,
            across the borders of its tiles; class tokens keep their own score and are nobody's neighbours.
            "none": no pooling. "1d" is what was published; on the embedded demo it does better than "2d", and
            "none" does better than both.
        reduction: "avg" or "max" over neighbours.

    Deviations: no causal mask within the window and no part of the budget for it, because the window is text
    and the cache holds images. The mean at a border is over the neighbours that are there, not over zeros
    beyond it. Nothing is pooled across tiles of a line, images, or with unseen tokens. An image of an
    interleaved chat that only earlier rows see has the last of these rows as its window.
    """

    window: int = 32
    kernel: int = 5
    pool: Literal["1d", "2d", "none"] = "1d"
    reduction: Literal["avg", "max"] = "avg"

    name: ClassVar[str] = "snapkv"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2404.14469 (SnapKV)"
    bibtex: ClassVar[str] = """
@article{snapkv2024,
  title = {{SnapKV}: {LLM} Knows What You are Looking for Before Generation},
  author = {Li, Yuhong and Huang, Yingbing and Yang, Bowen and Venkitesh, Bharat and Locatelli, Acyr and Ye,
            Hanchen and Cai, Tianle and Lewis, Patrick and Chen, Deming},
  year = {2024},
  eprint = {2404.14469},
  archivePrefix = {arXiv},
}
"""
    fidelity: ClassVar[str] = "adapted"
    cost: ClassVar[str] = (
        "the window's product of queries and keys in each layer that decides, and a few copies of one "
        "image's scores by query head; a few host synchronisations for each sample and image (pool=1d: tile)"
    )

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

    @property
    def needs(self) -> frozenset[Need]:
        """Attention is recomputed from queries, because fused kernels return no weights."""
        return frozenset({"queries"})

    def score(self, view: LayerView) -> Tensor:
        """Return pooled attention of the window by KV head ``[B, Hkv, S]``."""
        mass = view.window_mass(self.window)
        if self.pool != "none":
            mass = self._pooled(view, mass)
        return scoring.by_kv_head(mass, view.heads)

    def _pooled(self, view: LayerView, mass: Tensor) -> Tensor:
        """Pool the scores of each stratum on its own: windows of two strata are different rows."""
        pooled = mass
        for members in scoring.each_stratum(view.strata):
            if self.pool == "1d":
                places, images = scoring.lines(view.visibility, members)
            else:
                places, images = view.places, view.images
            smooth = scoring.pool_neighbours(mass, places, images, members, self.kernel, self.reduction)
            pooled = torch.where(members[:, None], smooth, pooled)
        return pooled
