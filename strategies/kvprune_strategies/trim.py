"""`trim`: Trimmed Llama, the method that this framework grew from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from kvprune import Budget, CrossKVPolicy, Decision, LayerView, onward_decision, scoring
from kvprune.errors import BudgetError


@dataclass(frozen=True, kw_only=True)
class Trim(CrossKVPolicy):
    """Keep the tokens that some head of the first cross-attention layer ranks among its best.

    Each query head of the first cross-attention layer adds up the attention that a token receives from the
    text rows of the prompt and picks its top k; the union over heads survives. Later layers project, attend
    to and store only survivors. With r(s) the best rank that any head gives to token s, the union is
    {s : r(s) < k}; so taking the K smallest r(s) is the same rule at an exact budget.

    Args:
        k_ratio: The paper's budget: k as a fraction of visible tokens, for each head. The kept fraction lies
            between k_ratio and Hq * k_ratio and differs by sample.
        keep_ratio: Equal-budget mode: exactly this fraction of visible tokens is kept; 0.5 if neither this
            nor k_ratio is given. Tokens of equal best rank are ordered by the attention of all heads.
        crop_first: Whether the first layer's own cache is cropped, too. Its prefill uses all tokens anyway.

    Deviations: k counts visible tokens, not padding tiles (the paper does not say); rows that see no image
    do not vote; an image of an interleaved chat that only earlier rows see is trimmed by the same rule on
    its own; the best token of each image always stays.
    """

    k_ratio: float | None = None
    keep_ratio: float | None = None
    crop_first: bool = True

    name: ClassVar[str] = "trim"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2504.00557 (Trimmed Llama)"
    bibtex: ClassVar[str] = """
@article{trim2025,
  title = {Efficient {LLaMA}-3.2-Vision by Trimming Cross-attended Visual Features},
  author = {Lee, Jewon and Song, Ki-Ung and Yang, Seungmin and Lim, Donguk and Kim, Jaeyeon and
            Shin, Wooksu and Kim, Bo-Kyeong and Lee, Yong Jae and Kim, Tae-Ho},
  year = {2025},
  eprint = {2504.00557},
  archivePrefix = {arXiv},
}
"""
    fidelity: ClassVar[str] = "faithful"
    cost: ClassVar[str] = "one product of queries and keys in one layer, 64 rows at a time"
    ranks_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.k_ratio is not None and self.keep_ratio is not None:
            raise BudgetError(
                f"trim takes k_ratio (per head) or keep_ratio (of the union), "
                f"got k_ratio={self.k_ratio!r} and keep_ratio={self.keep_ratio!r}"
            )
        if self.k_ratio is None and self.keep_ratio is None:
            object.__setattr__(self, "keep_ratio", 0.5)
        super().__post_init__()
        if self.k_ratio is not None and not 0 < self.k_ratio <= 1:
            raise BudgetError(f"k_ratio is a fraction of visible tokens in (0, 1], got {self.k_ratio!r}")
        self.budget  # noqa: B018  raises on an impossible budget

    @property
    def budget(self) -> Budget:
        """Budget of one head (k_ratio) or of the union (keep_ratio)."""
        return Budget(keep_ratio=self.keep_ratio if self.k_ratio is None else self.k_ratio)

    @property
    def exact_budget(self) -> Budget | None:
        """The budget of the union, in equal-budget mode."""
        return self.budget if self.k_ratio is None else None

    @property
    def requested(self) -> Mapping[str, float | int]:
        """What the options ask for: k_ratio counts for each head, keep_ratio for the union."""
        return super().requested if self.k_ratio is None else {"k_ratio": self.k_ratio}

    @property
    def needs(self) -> frozenset[Literal["queries", "raw_keys"]]:
        """Attention is recomputed from queries, because fused kernels return no weights."""
        return frozenset({"queries"})

    def select(self, view: LayerView) -> Decision:
        """Decide at the first cross-attention layer for all."""
        if view.rank > 0:
            return Decision()
        mass = view.attention_mass()  # [B, Hq, S]
        # Columns that nobody sees must not take up ranks.
        best_rank = scoring.rank_within(mass, view.strata).amin(1)  # [B, S]
        limit = scoring.limits(self.budget, view.strata)
        # Best rank first; equal ranks by total attention: two keys folded into one number.
        by_mass = scoring.rank_within(mass.sum(1, keepdim=True), view.strata)[:, 0]
        scores = -(best_rank * view.keys.shape[2] + by_mass)[:, None].to(torch.float64)
        if self.k_ratio is None:
            kept = scoring.keep_top(scores, view.strata, limit, view.visibility)
        else:
            union = (best_rank < limit) & (view.strata >= 0)
            one_per_group = scoring.keep_top(scores, view.strata, torch.zeros_like(limit), view.visibility)
            kept = union[:, None] | one_per_group
        return onward_decision(view, kept, crop_here=self.crop_first)
