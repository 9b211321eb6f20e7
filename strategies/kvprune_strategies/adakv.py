"""`adakv`: the heads of a layer share its budget, and heads with higher scores get more of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

from kvprune import BudgetPolicy, Decision, LayerView, ScoringPolicy, Selection, require_scorer, scoring
from kvprune.errors import PolicyOptionError
from kvprune.policy import Need
from kvprune_strategies.snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class AdaKV(BudgetPolicy):
    """Keep the tokens of a layer with the highest scores of all its heads together.

    With C tokens per head, the KV heads of a layer together keep exactly Hkv * C tokens. First each head
    keeps its own best floor(alpha * C); the rest are the highest of all other scores, in whichever head. At
    alpha = 0 no other choice of as many tokens has a higher sum of scores; at alpha = 1 all heads keep C.

    Heads of unequal length are stored padded to the longest one, with a mask. So the report's kept_fraction
    is the budget, while its bytes include the padding, which is really held.

    Args:
        alpha: Part of an even share that each head keeps in any case, in [0, 1]. The published comparisons
            use 0.2, an example of the authors 0.5.
        scorer: Scores tokens by KV head. Scores of different heads are compared directly, so they should have
            one scale, as attention has. If the heads share one score, they keep the same tokens.
    """

    alpha: float = 0.2
    scorer: ScoringPolicy = field(default_factory=SnapKV)

    name = "adakv"
    version = 1
    budget_scope = "layer"

    def select(self, view: LayerView) -> Decision:
        """Share the layer's budget among its heads, and keep the best tokens of each."""
        strata = view.decode_strata  # [B, S]
        scores = self.scorer.checked_scores(view, strata)  # [B, H, S]
        visible = (strata == 0).sum(-1, keepdim=True).expand(-1, scores.shape[1])  # [B, H]
        even = scoring.each(self.budget.resolve, visible)  # [B, H], C
        least = scoring.each(lambda count: int(Fraction(str(self.alpha)) * count), even)  # [B, H]
        least = least.maximum(scoring.group_counts(strata, view.visibility)[:, None])
        urgency = scoring.in_keeping_order(scores, strata, view.visibility)  # [B, H, S]
        counts = scoring.apportion(urgency, least, visible, even.sum(-1))  # [B, H]
        limit = counts[..., None].expand_as(scores)  # [B, H, S]
        return Decision(cache=Selection.from_mask(scoring.keep_top(scores, strata, limit, view.visibility)))

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

    fidelity = "adapted"
    paper = "arXiv 2407.11550 (Ada-KV)"
    deviations = """
    The published code counts each head's hits h among the best Hkv * C scores of all heads, and rounds
    (1 - alpha) * h + floor(alpha * C), which may miss the total. Here each head's own best come first, so the
    total is exact and a larger budget keeps a superset. Scores are not divided by the number of tokens that a
    head would keep, because that depends on the budget. The best token of each image stays in each head.
    """
    cost = "that of the scorer, and one sort of Hkv * S scores in each layer; three host synchronisations"
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
