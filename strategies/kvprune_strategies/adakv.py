"""`adakv`: the heads of a layer share its budget, and heads with higher scores get more of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from kvprune import (
    BudgetPolicy,
    Decision,
    LayerView,
    PolicySpec,
    ScoringPolicy,
    Selection,
    require_scorer,
    scoring,
)
from kvprune.errors import PolicyOptionError, ScoreError
from kvprune.policy import Need
from kvprune_strategies.snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class AdaKV(BudgetPolicy):
    """Keep the tokens of a layer with the highest scores of all its heads together.

    With C tokens per head, the KV heads of a layer together keep exactly Hkv * C tokens. A head's hits are
    its tokens among the Hkv * C highest scores of all heads, and it keeps its best (1 - alpha) * hits +
    alpha * C, rounded. At alpha = 0 no other choice of as many tokens has a higher sum of scores; at
    alpha = 1 all heads keep C.

    Heads of unequal length are stored padded to the longest one, with a mask. So the report's kept_fraction
    is the budget, while its bytes include the padding, which is really held.

    The published runs on LongBench score as `snapkv:preset=published` does (preset=published).
    KVCache-Factory has a window of 8 rows and normalizes (preset=kvcache-factory).

    Args:
        alpha: Part of the budget that heads share evenly, in [0, 1]. The published comparisons use 0.2, an
            example of the authors 0.5.
        safeguard: How alpha protects a head. "blend": as above, as published. "floor": each head keeps its
            best floor(alpha * C), and the rest are the highest of all other scores, in whichever head, as in
            kvpress.
        normalize: Whether a head's scores are first multiplied by the part of its scores that its best C
            tokens hold, so that heads whose attention is spread win less. The published code has it as an
            option that its runs do not use; KVCache-Factory uses it. The part depends on the budget, so a
            larger budget may then drop a token that a smaller one keeps.
        scorer: Scores tokens by KV head. Scores of different heads are compared directly, so they should have
            one scale, as attention has. If the heads share one score, they keep the same tokens.
    """

    alpha: float = 0.2
    safeguard: Literal["blend", "floor"] = "blend"
    normalize: bool = False
    scorer: ScoringPolicy = field(default_factory=SnapKV)

    name = "adakv"
    version = 2
    budget_scope = "layer"
    presets = MappingProxyType(
        {
            "published": {"alpha": 0.2, "scorer": PolicySpec("snapkv", {"preset": "published"})},
            "kvcache-factory": {
                "alpha": 0.2,
                "normalize": True,
                "scorer": PolicySpec("snapkv", {"preset": "kvcache-factory"}),
            },
        }
    )

    def select(self, view: LayerView) -> Decision:
        """Share the layer's budget among its heads, and keep the best tokens of each."""
        strata = view.decode_strata  # [B, S]
        scores = self.scorer.checked_scores(view, strata)  # [B, H, S]
        visible = (strata == 0).sum(-1, keepdim=True).expand(-1, scores.shape[1])  # [B, H]
        even = scoring.each(self.budget.resolve, visible)  # [B, H], C
        urgency = scoring.in_keeping_order(scores, strata, view.visibility)  # [B, H, S]
        if self.normalize:
            urgency = urgency * self._held_by_best(urgency, visible, even)
        least = scoring.group_counts(strata, view.visibility)[:, None].expand_as(even)  # [B, H]
        if self.safeguard == "floor":
            least = scoring.each(lambda count: int(Fraction(str(self.alpha)) * count), even).maximum(least)
        else:
            urgency = scoring.blended(urgency, visible, self.alpha)  # [B, H, S]
        counts = scoring.apportion(urgency, least, visible, even.sum(-1))  # [B, H]
        limit = counts[..., None].expand_as(scores)  # [B, H, S]
        return Decision(cache=Selection.from_mask(scoring.keep_top(scores, strata, limit, view.visibility)))

    def _held_by_best(self, scores: Tensor, visible: Tensor, even: Tensor) -> Tensor:
        """Return which part of a head's scores its first C tokens hold, ``[B, H, 1]``."""
        place = torch.arange(scores.shape[-1], device=scores.device)
        counted = scores.double().masked_fill(place >= visible[..., None], 0)  # [B, H, S]
        if bool((counted < 0).any()):
            raise ScoreError(
                f"policy {self.name!r} with normalize=True takes parts of sums of scores, so no score may be "
                f"negative, but {self.scorer.name!r} gave {float(counted.min()):.3g}; write normalize=False"
            )
        held = counted.cumsum(-1)  # [B, H, S], by the i best
        best = held.gather(-1, (even[..., None] - 1).clamp(min=0))  # [B, H, 1]
        part = best / held[..., -1:].clamp(min=torch.finfo(torch.float64).tiny)  # [B, H, 1]
        return part.to(scores.dtype)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_scorer(self.name, self.scorer)
        if not 0 <= self.alpha <= 1:
            raise PolicyOptionError(
                f"alpha of policy {self.name!r} is a part of a head's even share in [0, 1], "
                f"got {self.alpha!r}"
            )

    @property
    def needs(self) -> frozenset[Need]:
        """What the scorer needs."""
        return self.scorer.needs

    @property
    def ranks_tokens(self) -> bool:  # type: ignore[override]
        """Whether a larger budget keeps a superset: not if the budget weighs the heads."""
        return not self.normalize

    fidelity = "adapted"
    paper = "arXiv 2407.11550 (Ada-KV)"
    deviations = """
    The published code gives a head round((1 - alpha) * hits + floor(alpha * C)), which misses the total of
    Hkv * C where alpha * C is not whole or the rounded numbers do not add up. Here a share is (1 - alpha) *
    hits + alpha * C, and where rounding misses the total, the tokens that were due first are kept. So a
    larger budget keeps a superset. Where the published numbers meet the total, they are the same. Without
    gqa_support the published code counts and keeps by query head; here, as with it, by KV head. Scores that
    agree to five digits count as equal when hits are counted. kvpress counts the window, which it always
    keeps, in C and in a head's safe part. The best token of each image stays in each head.
    """
    differs = (
        "the total is exact, where the published rounding may miss it; the scorer's defaults (see snapkv)"
    )
    checked_against = (
        "same sets as FFY0/AdaKV@efe4e2e at preset=published and Zefan-Cai/KVCache-Factory@c97f9d7 at "
        "preset=kvcache-factory, where their rounding meets the total"
    )
    cost = "that of the scorer, and two sorts of Hkv * S scores in each layer; three host synchronisations"
    bibtex = """
@article{adakv2024,
  title = {{Ada-KV}: Optimizing {KV} Cache Eviction by Adaptive Budget Allocation for Efficient {LLM}
           Inference},
  author = {Feng, Yuan and Lv, Junlin and Cao, Yukun and Xie, Xike and Zhou, S. Kevin},
  year = {2024},
  eprint = {2407.11550},
  archivePrefix = {arXiv},
}
"""
