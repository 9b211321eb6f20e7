"""`trim`: Trimmed Llama, the method that this framework grew from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvprune import BudgetPolicy, Decision, LayerView, onward_decision, scoring


@dataclass(frozen=True, kw_only=True)
class Trim(BudgetPolicy):
    """Keep the tokens that some head of the first cross-attention layer ranks among its best.

    Each query head of the first cross-attention layer adds up the attention that a token receives from the
    text rows of the prompt, and picks its top k. The union over heads survives: later layers project, attend
    to and store only survivors. With r(s) the best rank that any head gives to token s, the union is
    {s : r(s) < k}. So keeping the K tokens of the smallest r(s) is the same rule at an exact budget.

    Args:
        k_ratio: The paper's budget: k as a fraction of visible tokens, for each head. The kept fraction lies
            between k_ratio and Hq * k_ratio and differs by sample.
        keep_ratio: Equal-budget mode: exactly this fraction of visible tokens is kept; 0.5 if no budget is
            given. Tokens of equal best rank are ordered by the attention of all heads.
        crop_first: Whether the first layer's own cache is pruned, too. Its prefill uses all tokens anyway.
    """

    k_ratio: float | None = None
    crop_first: bool = True

    name = "trim"
    version = 1
    needs = frozenset({"queries"})
    budget_alternatives = ("k_ratio",)

    def select(self, view: LayerView) -> Decision:
        """Decide at the first cross-attention layer for all."""
        if view.rank > 0:
            return Decision()
        mass, strata = view.attention_mass(), view.strata  # [B, Hq, S], [B, S]
        best_rank = scoring.rank_within(mass, strata).amin(1)  # [B, S], r(s)
        limit = scoring.limits(self.budget, strata)  # [B, S], K or k
        # Best rank first; equal ranks by total attention: two keys in one number, which float64 holds.
        by_mass = scoring.rank_within(mass.sum(1, keepdim=True), strata)[:, 0]  # [B, S]
        scores = -(best_rank * view.columns + by_mass)[:, None].to(torch.float64)  # [B, 1, S]
        if self.k_ratio is None:
            kept = scoring.keep_top(scores, strata, limit, view.visibility)  # [B, 1, S]
        else:
            union = (best_rank < limit) & (strata >= 0)  # [B, S]
            one_per_group = scoring.keep_top(scores, strata, torch.zeros_like(limit), view.visibility)
            kept = union[:, None] | one_per_group
        return onward_decision(view, kept, crop_here=self.crop_first)

    fidelity = "adapted"
    paper = "arXiv 2504.00557 (Trimmed Llama)"
    deviations = """
    No code was published, and only the abstract and the opening of the paper could be read. They say that the
    first cross-attention layer decides, that each head takes its top k, and that later layers receive the
    union. Unverified is what else was needed to run it: a token's attention is summed over text rows, k is a
    fraction of visible tokens (without padding tiles) and rounded up, and the first layer's own cache is
    cropped, too. keep_ratio, its default, and the order of tokens of equal best rank are our extension. Rows
    that see no image do not vote. An image of an interleaved chat that only earlier rows see is pruned on its
    own, by the same rule. The best token of each image always stays.
    """
    differs = (
        "only abstract and opening of the paper were read: summing rows, what k counts and cropping the "
        "first layer are our reading; keep_ratio is our extension"
    )
    checked_against = (
        "unverified: no code was published; with k_ratio, same sets as a transcription of the paper's opening"
    )
    cost = "one product of queries and keys in one layer, 64 rows at a time"
    bibtex = """
@article{trim2025,
  title = {Efficient {LLaMA}-3.2-Vision by Trimming Cross-attended Visual Features},
  author = {Lee, Jewon and Song, Ki-Ung and Yang, Seungmin and Lim, Donguk and Kim, Jaeyeon and
            Shin, Wooksu and Kim, Bo-Kyeong and Lee, Yong Jae and Kim, Tae-Ho},
  year = {2025},
  eprint = {2504.00557},
  archivePrefix = {arXiv},
}
"""
