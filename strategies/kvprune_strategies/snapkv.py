"""`snapkv`: attention from the end of the prompt, pooled over neighbouring tokens."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from kvprune import LayerView, ScoringPolicy, scoring
from kvprune.errors import PolicyOptionError


@dataclass(frozen=True, kw_only=True)
class SnapKV(ScoringPolicy):
    """Keep the tokens with the highest attention from a window of last text rows, pooled over neighbours.

    In each query head, a token's score is the attention from the window's rows, pooled over neighbouring
    tokens. A KV head averages its query heads.

    Args:
        window: Number of last live rows that count; all if there are fewer. In the published code, the
            default of the class is 64 and that of the configuration 32. 32 covers most questions about a
            picture.
        kernel: Width of the pooling window in tokens, odd; 1 pools nothing.
        pool: Which tokens are neighbours. "1d": tokens next to each other in the cache, within one tile, its
            class token first. "2d": a square of kernel x kernel patches of the image, across the borders of
            its tiles; class tokens keep their own score and are nobody's neighbours. "none": no pooling. The
            paper has "1d"; on the embedded demo it does better than "2d", and "none" does better than both.
        reduction: "avg" or "max" over neighbours.
    """

    window: int = 32
    kernel: int = 5
    pool: Literal["1d", "2d", "none"] = "1d"
    reduction: Literal["avg", "max"] = "avg"

    name = "snapkv"
    version = 1
    needs = frozenset({"queries"})
    presets = MappingProxyType({"published": {"window": 32, "kernel": 7, "reduction": "max"}})

    def score(self, view: LayerView) -> Tensor:
        """Return pooled attention of the window by KV head ``[B, Hkv, S]``."""
        mass = view.window_mass(self.window)  # [B, Hq, S]
        if self.pool != "none":
            mass = self._pooled(view, mass)
        return scoring.by_kv_head(mass, view.heads)

    def _pooled(self, view: LayerView, mass: Tensor) -> Tensor:
        """Pool the scores ``[B, Hq, S]`` of each stratum on its own: each has a window of its own."""
        pooled = mass
        for members in scoring.each_stratum(view.strata):  # [B, S]
            if self.pool == "1d":
                places, images = scoring.lines(view.visibility, members)
            else:
                places, images = view.places, view.images  # [B or 1, S, 2], [B or 1, S]
            smooth = scoring.pool_neighbours(mass, places, images, members, self.kernel, self.reduction)
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
    There is no causal mask within the window and no part of the budget for it, because the window is text and
    the cache holds images. The mean at a border is over the neighbours that exist, without zeros beyond the
    border. Pooling crosses no image, and with "1d" no tile, and leaves unseen tokens out. If only earlier
    rows of a chat see an image, its window is the last of these rows.
    """
    cost = (
        "the window's product of queries and keys in each layer that decides, and a few copies of one "
        "image's scores by query head; a few host synchronisations for each sample and image (pool=1d: tile)"
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
