"""`pyramid`: the budget of a layer falls from the first cross-attention layer to the last, along a line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvprune import ScoringPolicy
from kvprune.errors import PolicyOptionError
from kvprune.policy import LayerAllocator
from kvprune_strategies.snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class Pyramid(LayerAllocator):
    """Keep more in the first cross-attention layers than in the last, as PyramidKV does.

    With C tokens to a layer on average, the last layer keeps C / beta, the first 2 C - C / beta, and those
    between lie on the line. Where the first cannot keep that many, it keeps all its V visible tokens and
    the line ends at 2 C - V. Layers are counted among the cross-attention layers.

    Args:
        beta: How steep the line is, at least 1; at 1 all layers keep the same.
        shape: "inverted" gives the last layer what "pyramid" gives the first. Which cross-attention layers
            deserve more is an open question.
        scorer: See `kvprune.policy.allocators.LayerAllocator`, also for keep_ratio and keep_tokens.

    Deviations: the original adds a window of recent tokens to each layer; here the window is text and the
    cache holds images. It rounds the step of the line down, so that the total drifts; here all layers
    together keep exactly L * C, rounded where their shares are nearest to a whole number.
    """

    scorer: ScoringPolicy = field(default_factory=SnapKV)
    beta: float = 20
    shape: Literal["pyramid", "inverted"] = "pyramid"

    name: ClassVar[str] = "pyramid"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2406.02069 (PyramidKV)"
    bibtex: ClassVar[str] = """
@article{pyramid2024,
  title = {{PyramidKV}: Dynamic {KV} Cache Compression based on Pyramidal Information Funneling},
  author = {Cai, Zefan and Zhang, Yichi and Gao, Bofei and others},
  year = {2024},
  eprint = {2406.02069},
  archivePrefix = {arXiv},
}
"""
    fidelity: ClassVar[str] = "adapted"
    cost: ClassVar[str] = (
        "that of the scorer in each layer, its scores of all layers until the last has attended, and then a "
        "sort of L * S numbers; all layers hold all tokens until then"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta >= 1:
            raise PolicyOptionError(
                f"beta of policy {self.name!r} is the mean budget over the smallest, at least 1, "
                f"got {self.beta!r}"
            )

    def urgency(self, measured: Tensor, visible: Tensor, columns: int) -> Tensor:
        """The i-th token of a layer is due at the mean budget C at which the layer's share is i + 1/2."""
        layers = visible.shape[1]
        down = torch.arange(layers, dtype=torch.float64, device=visible.device) / max(1, layers - 1)
        if self.shape == "inverted":
            down = 1 - down
        down = down[:, None]
        steepest = 2 - 1 / self.beta
        slope = steepest - down * (steepest - 1 / self.beta)  # share / C, as long as none keeps all
        share = torch.arange(columns, dtype=torch.float64, device=visible.device) + 0.5
        all_of_it = visible[..., None].double()
        # From here on the top of the line keeps all, and the line turns about it.
        turned = all_of_it - (all_of_it - share) / (2 * down.clamp(min=torch.finfo(torch.float64).tiny))
        due = torch.where(share * steepest <= slope * all_of_it, share / slope, turned)
        return -due
