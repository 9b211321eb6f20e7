"""`pyramid`: the budget of the layers falls linearly from the first cross-attention layer to the last."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from kvprune import PolicySpec, ScoringPolicy
from kvprune.errors import PolicyOptionError
from kvprune.policy import LayerAllocator
from kvprune_strategies.snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class Pyramid(LayerAllocator):
    """Keep more in the first cross-attention layers than in the last, as PyramidKV does.

    With C tokens per layer on average, the last layer keeps C / beta, the first 2 C - C / beta, and those in
    between lie on the line. If the first layer has not that many, it keeps all its V visible tokens, and the
    last layer keeps 2 C - V. Only cross-attention layers count.

    The authors' runs on LongBench score with a window of 8 rows and the maximum over 7 tokens
    (preset=published), as `snapkv:preset=kvcache-factory` does.

    Args:
        beta: How steep the line is, at least 1; at 1 all layers keep the same. The published code has 20.
        shape: "inverted" gives the last layer what "pyramid" gives the first. Which cross-attention layers
            deserve more is an open question.
        scorer: See `kvprune.policy.LayerAllocator`, also for keep_ratio and keep_tokens.
    """

    scorer: ScoringPolicy = field(default_factory=SnapKV)
    beta: float = 20
    shape: Literal["pyramid", "inverted"] = "pyramid"

    name = "pyramid"
    version = 2
    presets = MappingProxyType(
        {"published": {"beta": 20, "scorer": PolicySpec("snapkv", {"preset": "kvcache-factory"})}}
    )

    def urgency(self, measured: Tensor, visible: Tensor, columns: int) -> Tensor:
        """Return minus the mean budget C at which a layer's share reaches its i-th token (i + 1/2)."""
        layers = visible.shape[1]
        down = torch.arange(layers, dtype=torch.float64, device=visible.device) / max(1, layers - 1)  # [L]
        if self.shape == "inverted":
            down = 1 - down
        down = down[:, None]  # [L, 1], 0 at the layer that keeps most, 1 at the one that keeps least
        steepest = 2 - 1 / self.beta
        slope = steepest - down * (steepest - 1 / self.beta)  # [L, 1], share / C while no layer keeps all
        share = torch.arange(columns, dtype=torch.float64, device=visible.device) + 0.5  # [S]
        full = visible[..., None].double()  # [B, L, 1]
        # Once the layer that keeps most keeps all, C raises the other end of the line only.
        turned = full - (full - share) / (2 * down.clamp(min=torch.finfo(torch.float64).tiny))  # [B, L, S]
        due = torch.where(share * steepest <= slope * full, share / slope, turned)  # [B, L, S]
        return -due

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta >= 1:
            raise PolicyOptionError(
                f"beta of policy {self.name!r} is the mean budget over the smallest, at least 1, "
                f"got {self.beta!r}"
            )

    fidelity = "adapted"
    paper = "arXiv 2406.02069 (PyramidKV)"
    deviations = """
    The published code keeps the same number in all layers as soon as the prompt is shorter than 2 C, so above
    half of the tokens; here the line only turns about the first layer, which keeps all. With the jump of the
    published code, a larger budget would take tokens from the first layers. The published code rounds the
    last layer's share and the step of the line down, so its total drifts; here all layers together keep
    exactly L * C, rounded where their shares are nearest to a whole number. The original adds a window of
    recent tokens to each layer; here the window is text and the cache holds images.
    """
    differs = "above half of the tokens the line turns (published: all layers alike); the total is exact"
    checked_against = (
        "same sets as Zefan-Cai/KVCache-Factory@c97f9d7 (PyramidKVCluster) at preset=published, up to half "
        "of the tokens and where its steps are whole numbers"
    )
    cost = (
        "that of the scorer in each layer, its scores of all layers until the last has attended, and then a "
        "sort of L * S numbers; all layers hold all tokens until then"
    )
    bibtex = """
@article{pyramid2024,
  title = {{PyramidKV}: Dynamic {KV} Cache Compression based on Pyramidal Information Funneling},
  author = {Cai, Zefan and Zhang, Yichi and Gao, Bofei and others},
  year = {2024},
  eprint = {2406.02069},
  archivePrefix = {arXiv},
}
"""
