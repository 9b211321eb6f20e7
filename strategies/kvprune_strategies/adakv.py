"""`adakv`: heads of a layer share its budget, and those with the higher scores get more of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar, Literal

from kvprune import BudgetPolicy, Decision, LayerView, ScoringPolicy, Selection, require_scorer, scoring
from kvprune.errors import PolicyOptionError
from kvprune.policy import Need, check_scores
from kvprune_strategies.snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class AdaKV(BudgetPolicy):
    """Keep the tokens of a layer with the highest scores of all its heads together.

    With C tokens to a head, the KV heads of a layer together keep exactly Hkv * C: first each head its own
    best floor(alpha * C), then the highest of all other scores, in whichever heads they are. At alpha = 0 no
    other choice of as many tokens has a higher sum of scores; at alpha = 1 all heads keep C.

    Heads of unequal length are stored padded to the longest one, with a mask for what pads them. The report's
    kept_fraction is the budget, but its bytes count the padding: they are what is really held.

    Args:
        alpha: Part of its even share that a head is sure of, in [0, 1]. 0.2 is what the published comparisons
            use; an example of the authors has 0.5.
        scorer: Scores tokens by KV head. Scores of different heads are compared as they are, so they should
            have one scale, as attention has. Where its heads share one score, they keep the same.

    Deviations: the published code first gives each head its hits h among the best Hkv * C of all and then
    rounds (1 - alpha) * h + floor(alpha * C), which may miss the total; here each head's own best come
    first, so the total is exact and a larger budget keeps a superset. Scores are not divided by what a head
    would keep, which would depend on the budget. The best token of each image stays in each head.
    """

    alpha: float = 0.2
    scorer: ScoringPolicy = field(default_factory=SnapKV)

    name: ClassVar[str] = "adakv"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2407.11550 (Ada-KV)"
    bibtex: ClassVar[str] = """
@article{adakv2024,
  title = {{Ada-KV}: Optimizing {KV} Cache Eviction by Adaptive Budget Allocation for Efficient {LLM}
           Inference},
  author = {Feng, Yuan and Lv, Junlin and Cao, Yukun and Xie, Xike and Zhou, S. Kevin},
  year = {2024},
  eprint = {2407.11550},
  archivePrefix = {arXiv},
}
"""
    fidelity: ClassVar[str] = "adapted"
    cost: ClassVar[str] = (
        "that of the scorer, and one sort of Hkv * S scores in each layer; three host synchronisations"
    )
    budget_scope: ClassVar[Literal["head", "layer", "model"]] = "layer"

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

    def select(self, view: LayerView) -> Decision:
        """Share the layer's budget out among its heads."""
        strata = view.decode_strata
        scores = check_scores(self.scorer.score(view), view, strata, self.scorer.name)
        visible = (strata == 0).sum(-1, keepdim=True).expand(-1, scores.shape[1])  # [B, H]
        even = scoring.each(self.budget.resolve, visible)
        least = scoring.each(lambda count: int(Fraction(str(self.alpha)) * count), even)
        least = least.maximum(scoring.group_counts(strata, view.visibility)[:, None])
        urgency = scoring.in_keeping_order(scores, strata, view.visibility)
        counts = scoring.apportion(urgency, least, visible, even.sum(-1))
        limit = counts[..., None].expand_as(scores)
        return Decision(cache=Selection.from_mask(scoring.keep_top(scores, strata, limit, view.visibility)))
