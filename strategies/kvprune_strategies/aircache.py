"""`aircache`: the text rows that the last row attends to vote; layers with outstanding tokens keep more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvprune import LayerView, scoring
from kvprune.errors import PolicyOptionError
from kvprune.policy import ProportionalAllocator


@dataclass(frozen=True, kw_only=True)
class AirCache(ProportionalAllocator):
    """Keep the tokens that elite text rows attend to, and more of them where attention is skewed.

    In the self-attention before the layer, the last row gives each text row a weight (mean over heads). Rows
    whose weight is at least ``alpha`` times the largest one are elite. A token's importance is the attention
    that it receives from elite rows, mean over rows and heads. A layer's share of the budget is the mean of
    two numbers, each divided by its mean over layers: its strength, and the skewness of importance.

    Args:
        alpha: In [0, 1]; at 0 all rows that see the image vote.
        strength: In the published rule, a layer's strength is the attention that goes to the image. In
            cross-attention that is 1 in every layer. "constant" keeps it at 1, so half of the budget is
            shared evenly. "output" is our substitute: the length of the attention output, over all heads,
            under the elite rows' mean attention (before the output projection and the layer's gate, which
            policies do not see). "none": skewness alone.
        scorer: Ranks tokens in place of their importance; it does not change the shares. See
            `kvprune.policy.LayerAllocator`, also for keep_ratio and keep_tokens.
    """

    alpha: float = 0.9
    strength: Literal["constant", "output", "none"] = "constant"

    name = "aircache"
    version = 1
    measure_needs = frozenset({"queries", "text"})

    def elite(self, view: LayerView) -> Tensor:
        """Mark the rows that vote, bool ``[B, T]``."""
        rows = view.live.shape[1]
        decodable = view.strata == 0  # [B, S]
        candidates = scoring.last_rows(view.visibility, rows, decodable)  # [B, T]
        last = scoring.last_rows(view.visibility, 1, decodable)  # [B, T]
        reference = last.to(torch.uint8).argmax(-1, keepdim=True)  # [B, 1]
        weights = view.text.attention_of(reference).mean(1)[:, 0, -rows:]  # [B, T], this call's rows
        weights = weights.to(candidates.device).masked_fill(~candidates, -1)
        return (candidates & (weights >= self.alpha * weights.amax(-1, keepdim=True))) | last

    def measure(self, view: LayerView) -> Tensor:
        """Return strength, skewness, and the importance of each token, ``[B, 2 + S]``."""
        elite = self.elite(view)  # [B, T]
        mean = view.attention_mass(elite) / elite.sum(-1).clamp(min=1)[:, None, None]  # [B, Hq, S]
        visible = view.strata == 0  # [B, S]
        importance = scoring.pool_heads(mean)[:, 0].masked_fill(~visible, 0)  # [B, S]
        strength = torch.ones_like(importance[:, 0])  # [B]
        if self.strength == "output":
            strength = _output_length(mean, view.values)
        return torch.cat([strength[:, None], _skewness(importance, visible)[:, None], importance], dim=-1)

    def rank(self, view: LayerView, measured: Tensor) -> Tensor:
        """Rank by the scorer if there is one, else by importance."""
        return measured[:, None, 2:] if self.scorer is None else super().rank(view, measured)

    def weights(self, measured: Tensor) -> Tensor:
        """Return the mean of strength and skewness, each divided by its mean over layers, ``[B, L]``."""
        strength, skewness = _over_mean(measured[..., 0]), _over_mean(measured[..., 1])
        return skewness if self.strength == "none" else (strength + skewness) / 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise PolicyOptionError(
                f"alpha of policy {self.name!r} is a part of the largest weight in [0, 1], got {self.alpha!r}"
            )

    fidelity = "adapted"
    paper = "arXiv 2503.23956 (AirCache)"
    deviations = """
    The authors published no code, and only summaries of the paper could be read. In these, importance is
    softmax over image tokens and elite text together; here image tokens do not compete with text. How heads
    are treated, how strength and skewness are normalised, and how counts are rounded could not be verified;
    it is our choice to average heads, to divide by means, and to clamp negative skewness to 0.

    Only rows that see what decoding sees can be elite; the last of them always is. Padding and rows
    before the image do not count for the largest weight, which the first token often has. Weights between
    text rows are those of the self-attention layer just before. What a layer cannot hold of its share goes to
    the other layers, and the report says so.
    """
    differs = (
        "softmax over image tokens only, so strength is always 1; heads, normaliser and rounding are ours"
    )
    checked_against = (
        "unverified: no code of the authors; same sets as a transcription of the rule as summaries give it, "
        "over image tokens"
    )
    cost = (
        "in each layer, one row of text attention and the elite rows' product of queries and keys "
        "(strength=output: and one product with values); S numbers of each layer until the last has "
        "attended, when L * S numbers are sorted; all layers hold all tokens until then; a few host "
        "synchronisations for each sample and layer"
    )
    bibtex = """
@article{aircache2025,
  title = {{AirCache}: Activating Inter-modal Relevancy {KV} Cache Compression for Efficient Large
           Vision-Language Model Inference},
  author = {Huang, Kai and others},
  year = {2025},
  eprint = {2503.23956},
  archivePrefix = {arXiv},
}
"""


def _skewness(numbers: Tensor, counted: Tensor) -> Tensor:
    """Return the skewness of each sample's counted numbers, ``[B]``; 0 if negative, or if all are equal.

    Fewer than three numbers have the skewness 0.

    Args:
        numbers: ``[B, S]``.
        counted: bool, same shape.
    """
    exact = numbers.double()  # [B, S]
    count = counted.sum(-1).double()  # [B]
    mean = exact.masked_fill(~counted, 0).sum(-1) / count.clamp(min=1)  # [B]
    off = (exact - mean[:, None]).masked_fill(~counted, 0)  # [B, S]
    deviation = (off.square().sum(-1) / (count - 1).clamp(min=1)).sqrt()  # [B]
    # Equal numbers differ by rounding, whose skewness means nothing.
    spread = (deviation > 1e-6 * mean.abs()) & (count >= 3)  # [B]
    cubes = (off / torch.where(spread, deviation, 1.0)[:, None]).pow(3).sum(-1)  # [B]
    skewness = cubes * count / ((count - 1) * (count - 2)).clamp(min=1)
    return torch.where(spread, skewness.clamp(min=0), 0.0).to(numbers.dtype)


def _output_length(weights: Tensor, values: Tensor) -> Tensor:
    """Return the length of the weighted sum of values, all heads together, ``[B]``.

    Args:
        weights: ``[B, Hq, S]``.
        values: ``[B, Hkv, S, D]``.
    """
    lengths = []  # one sample at a time, which needs less memory
    for of_sample, values_of_sample in zip(weights, values, strict=True):
        by_kv_head = of_sample.unflatten(0, (len(values_of_sample), -1))  # [Hkv, G, S]
        lengths.append((by_kv_head @ values_of_sample.to(of_sample.dtype)).norm())  # of [Hkv, G, D]
    return torch.stack(lengths)


def _over_mean(numbers: Tensor) -> Tensor:
    """Divide ``[B, L]`` by its mean over layers; 1 where that mean is 0."""
    mean = numbers.double().mean(-1, keepdim=True)
    return torch.where(mean > 0, numbers / mean, 1.0)
