"""`prumerge`: the tokens that stand out in the class token's attention stay, and absorb the others."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from kvprune import BudgetPolicy, Decision, FeaturePolicy, FeatureView, scoring
from kvprune.errors import PolicyOptionError
from kvprune.policy import check_scores, merge_weighted
from kvprune_strategies.class_attention import class_columns, merge_into_most_similar


@dataclass(frozen=True, kw_only=True)
class PruMerge(BudgetPolicy, FeaturePolicy):
    """Keep the tokens whose class attention is an outlier, and add the others to them.

    Class attention is the attention that the class token of a tile pays to the patches of that tile in one
    layer of the vision encoder. A token is an outlier if it receives more than Q3 + 1.5 (Q3 - Q1), with the
    quartiles Q1 and Q3 of its image; so the number of tokens kept depends on the image. Each other token is
    added to the most similar kept token (cosine of features), weighted with its own class attention. It knows
    nothing of the question, and decides before the first cross-attention layer.

    Args:
        keep_ratio: Equal-budget mode: exactly this fraction of visible tokens is kept, those with most class
            attention. If neither this nor keep_tokens is given, outliers are kept.
        keep_tokens: Likewise, a number of visible tokens.
        fence: How many times Q3 - Q1 an outlier lies beyond Q3, at least 0.
        plus: PruMerge+: evenly spaced tokens are kept besides, before anything is merged.
        spread: With plus, share of the kept tokens that is evenly spaced, in [0, 1). The default is three for
            each outlier, which is our choice.
        merge: "sum" adds weighted tokens to the kept one, whose weight is 1. "avg" is the mean of all,
            weighted with class attention.
        class_tokens: "rank" gives class tokens no class attention, so they are dropped first. "keep" puts
            them before all patches. They are kept besides the outliers, but count in a budget.
    """

    fence: float = 1.5
    plus: bool = False
    spread: float = 0.75
    merge: Literal["sum", "avg"] = "sum"
    class_tokens: Literal["rank", "keep"] = "rank"

    name = "prumerge"
    version = 1
    needs = frozenset({"class_attention"})
    default_ratio = None  # outliers say how many

    def choose(self, view: FeatureView) -> Decision:
        """Keep what stands out, and add the others to it."""
        paid = check_scores(view.class_attention[:, None], view, view.strata, self.name)  # [B, 1, S]
        kept = self._kept(view, paid)  # [B, 1, S]
        return merge_into_most_similar(
            view,
            kept,
            kept[:, 0],
            lambda kept, buckets: merge_weighted(kept, buckets, self._weights(paid.double(), buckets, kept)),
        )

    def _kept(self, view: FeatureView, paid: Tensor) -> Tensor:
        """Return what is kept, bool ``[B, 1, S]``."""
        classes = class_columns(view)  # [B, S]
        share = Fraction(str(self.spread)) if self.plus else Fraction(0)
        if self.stated_budget:
            strata = view.strata  # [B, S]
            limit = scoring.limits(self.budget, strata)  # [B, S]
            even = limit * share.numerator // share.denominator  # [B, S]
        else:
            # Each image is a stratum. A sample without an image sees everything, which is one stratum, too.
            strata = torch.where(view.strata >= 0, view.groups + 1, -1)
            found = self._outliers(paid[:, 0], torch.where(classes, -1, strata))  # [B, S]
            limit = torch.where(strata >= 0, scoring.stratum_sizes(strata, found).clamp(min=1), 0)
            more = share / (1 - share)
            even = limit * more.numerator // more.denominator
            if self.class_tokens == "keep":
                limit = limit + scoring.stratum_sizes(strata, classes)
            limit = limit + even
        if self.class_tokens == "keep":
            paid = paid + 2 * classes[:, None]  # attention is at most 1
        scores, _ = scoring.share_evenly(paid, view.visibility, strata, limit, even)  # [B, 1, S]
        return scoring.keep_top(scores, strata, limit, view.visibility)

    def _outliers(self, paid: Tensor, cells: Tensor) -> Tensor:
        """Mark the columns beyond the fence of their cell, bool ``[B, S]``."""
        found = torch.zeros_like(cells, dtype=torch.bool)
        for sample, columns in scoring.members(cells):  # columns: [n]
            values = paid[sample, columns].double()
            low, high = values.quantile(values.new_tensor([0.25, 0.75]))
            found[sample, columns] = values > high + self.fence * (high - low)
        return found

    def _weights(self, paid: Tensor, buckets: Tensor, kept: Tensor) -> Tensor:
        """Return the weight of each column in its bucket, float64 ``[B, 1, S]``.

        A bucket that receives no attention at all is its kept token.
        """
        if self.merge == "sum":
            return torch.where(kept, 1, paid)
        target = buckets.clamp(min=0)
        total = torch.zeros_like(paid).scatter_add_(-1, target, torch.where(buckets >= 0, paid, 0))
        total = total.gather(-1, target)  # [B, 1, S], of each column's bucket
        return torch.where(total > 0, paid / total, kept.double())

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fence < 0:
            raise PolicyOptionError(
                f"fence counts distances between quartiles, at least 0, got {self.fence!r}"
            )
        if not 0 <= self.spread < 1:
            raise PolicyOptionError(f"spread is a share of the kept tokens in [0, 1), got {self.spread!r}")

    fidelity = "adapted"
    paper = "arXiv 2403.15388 (LLaVA-PruMerge)"
    deviations = """
    The original adds to each kept token the 32 tokens most similar to it, so that a token may be added to
    several kept ones or to none. It also keeps one more token, the weighted sum of all that are dropped. Here
    each dropped token is added to exactly one. The original's class attention is that of one head over the
    full width of queries and keys; here it is summed over heads, and scaled to add up to 1 in each tile.
    Similarity is that of projected features, not of the encoder's keys. Each image has its own number of
    kept tokens, whatever the batch. A token is never added to one of another image, or to one that other text
    rows see. The best token of each image stays even if none stands out. Class tokens are neither added nor
    added to.
    """
    cost = (
        "class rows of one encoder layer's attention; C products for each pair of kept and dropped token; "
        "24 MiB; some transfers to the host for each image"
    )
    bibtex = """@misc{prumerge2024,
  title = {{LLaVA-PruMerge}: Adaptive Token Reduction for Efficient Large Multimodal Models},
  author = {Shang, Yuzhang and others},
  year = {2024},
  eprint = {2403.15388},
  archivePrefix = {arXiv},
}"""
