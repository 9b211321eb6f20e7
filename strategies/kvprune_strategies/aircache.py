"""`aircache`: text rows that matter to the last one vote; layers with outstanding tokens keep more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvprune import LayerView, scoring
from kvprune.errors import PolicyOptionError
from kvprune.policy import Need, ProportionalAllocator


@dataclass(frozen=True, kw_only=True)
class AirCache(ProportionalAllocator):
    """Keep the tokens that elite text rows attend to, and more of them where attention is skewed.

    Elite rows are those that get at least ``alpha`` times the largest weight which the last row gives to a
    text row in the self-attention before the layer, mean over heads. A token's importance is the attention
    that it receives from them, mean over rows and heads. A layer's share of the budget is the mean of
    two numbers, each divided by its mean over layers: its strength, and the skewness of importance.

    Args:
        alpha: In [0, 1]; at 0 all rows that see the image vote.
        strength: A layer's strength in the published rule is the attention that goes to the image, which is
            1 in every layer here, where rows attend to nothing else. "constant": so half of the budget is
            shared evenly. "output": our substitute, the length of the attention output of the elite rows'
            mean attention, over all heads (before the output projection and the layer's gate, which policies
            do not see). "none": skewness alone.
        scorer: Ranks tokens in place of their importance; shares stay as they are. See
            `kvprune.policy.allocators.LayerAllocator`, also for keep_ratio and keep_tokens.

    Deviations: only rows that see what decoding sees can be elite, the last of them always is, and padding
    and what comes before the image are left out before the largest weight is looked for: the first token
    often has it. Which text rows attend to is read off the self-attention layer just before. Image tokens do
    not compete with elite text for attention. That heads are averaged, and strength and skewness divided by
    their means, is our choice. Negative skewness counts as 0. Shares beyond what a layer has go to the
    others, and the report says so.
    """

    alpha: float = 0.9
    strength: Literal["constant", "output", "none"] = "constant"

    name: ClassVar[str] = "aircache"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2503.23956 (AirCache)"
    bibtex: ClassVar[str] = """
@article{aircache2025,
  title = {{AirCache}: Activating Inter-modal Relevancy {KV} Cache Compression for Efficient Large
           Vision-Language Model Inference},
  author = {Huang, Kai and others},
  year = {2025},
  eprint = {2503.23956},
  archivePrefix = {arXiv},
}
"""
    fidelity: ClassVar[str] = "adapted"
    cost: ClassVar[str] = (
        "in each layer, one row of text attention and the elite rows' product of queries and keys "
        "(strength=output: and one product with values); S numbers of each layer until the last has "
        "attended, when L * S numbers are sorted; all layers hold all tokens until then; a few host "
        "synchronisations for each sample and layer"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise PolicyOptionError(
                f"alpha of policy {self.name!r} is a part of the largest weight in [0, 1], got {self.alpha!r}"
            )

    @property
    def needs(self) -> frozenset[Need]:
        """The text's self-attention chooses rows, whose attention is recomputed from queries."""
        return super().needs | {"queries", "text"}

    def elite(self, view: LayerView) -> Tensor:
        """Mark the rows that vote, bool ``[B, T]``."""
        rows = view.live.shape[1]
        decodable = view.strata == 0
        candidates = scoring.last_rows(view.visibility, rows, decodable)
        last = scoring.last_rows(view.visibility, 1, decodable)
        reference = last.to(torch.uint8).argmax(-1, keepdim=True)
        weights = view.text.attention_of(reference).mean(1)[:, 0, -rows:]  # [B, T], this call's rows
        weights = weights.to(candidates.device).masked_fill(~candidates, -1)
        return (candidates & (weights >= self.alpha * weights.amax(-1, keepdim=True))) | last

    def measure(self, view: LayerView) -> Tensor:
        """Return strength, skewness, and the importance of each token, ``[B, 2 + S]``."""
        elite = self.elite(view)
        mean = view.attention_mass(elite) / elite.sum(-1).clamp(min=1)[:, None, None]  # [B, Hq, S]
        visible = view.strata == 0
        importance = scoring.pool_heads(mean)[:, 0].masked_fill(~visible, 0)
        strength = torch.ones_like(importance[:, 0])
        if self.strength == "output":
            strength = _output_length(mean, view.values)
        return torch.cat([strength[:, None], _skewness(importance, visible)[:, None], importance], dim=-1)

    def rank(self, view: LayerView, measured: Tensor) -> Tensor:
        """Rank by importance, or ask the scorer if there is one."""
        return measured[:, None, 2:] if self.scorer is None else super().rank(view, measured)

    def weights(self, measured: Tensor) -> Tensor:
        """Mean of strength and skewness, each over its mean over layers."""
        strength, skewness = _over_mean(measured[..., 0]), _over_mean(measured[..., 1])
        return skewness if self.strength == "none" else (strength + skewness) / 2


def _skewness(numbers: Tensor, counted: Tensor) -> Tensor:
    """Skewness of the counted numbers of each sample, ``[B]``: 0 if negative, for equal or fewer than 3 ones.

    Args:
        numbers: ``[B, S]``.
        counted: bool, same shape.
    """
    exact = numbers.double()
    count = counted.sum(-1).double()
    mean = exact.masked_fill(~counted, 0).sum(-1) / count.clamp(min=1)
    off = (exact - mean[:, None]).masked_fill(~counted, 0)
    deviation = (off.square().sum(-1) / (count - 1).clamp(min=1)).sqrt()
    # Rounding of equal numbers has a skewness, too, which means nothing.
    spread = (deviation > 1e-6 * mean.abs()) & (count >= 3)
    cubes = (off / torch.where(spread, deviation, 1.0)[:, None]).pow(3).sum(-1)
    skewness = cubes * count / ((count - 1) * (count - 2)).clamp(min=1)
    return torch.where(spread, skewness.clamp(min=0), 0.0).to(numbers.dtype)


def _output_length(weights: Tensor, values: Tensor) -> Tensor:
    """Length of the weighted sums of values over all heads, ``[B]``, one sample at a time.

    Args:
        weights: ``[B, Hq, S]``.
        values: ``[B, Hkv, S, D]``.
    """
    lengths = []
    for of_sample, values_of_sample in zip(weights, values, strict=True):
        by_kv_head = of_sample.unflatten(0, (len(values_of_sample), -1))
        lengths.append((by_kv_head @ values_of_sample.to(of_sample.dtype)).norm())
    return torch.stack(lengths)


def _over_mean(numbers: Tensor) -> Tensor:
    """Divide by the mean over layers, ``[B, L]``; 1 where that is 0."""
    mean = numbers.double().mean(-1, keepdim=True)
    return torch.where(mean > 0, numbers / mean, 1.0)
