"""`prumerge`: the tokens that stand out in the class token's attention stay, and absorb the others."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
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
        plus: PruMerge+: evenly spaced tokens are kept besides, before anything is merged. The published
            ``forward()`` runs this form.
        spread: With plus, share of the kept tokens that is evenly spaced, in [0, 1). The default is three for
            each outlier, about as many as the published stride gives.
        spacing: Which tokens are evenly spaced. "even": the first ones of an order in which every beginning
            is evenly spaced, none of them an outlier. "stride" is the original's and needs outliers to say
            how many are kept: every n-th patch of the image from the first on, without the image's last one,
            where n is a third of the patches for each outlier, rounded down twice; outliers on the stride are
            not replaced, and ``spread`` is not used.
        merge: "sum" adds weighted tokens to the kept one, whose weight is 1. "avg" is the mean of all,
            weighted with class attention.
        class_tokens: "rank" gives class tokens no class attention, so they are dropped first. "keep" puts
            them before all patches. They are kept besides the outliers, but count in a budget.
    """

    fence: float = 1.5
    plus: bool = False
    spread: float = 0.75
    spacing: Literal["even", "stride"] = "even"
    merge: Literal["sum", "avg"] = "sum"
    class_tokens: Literal["rank", "keep"] = "rank"

    name = "prumerge"
    version = 1
    needs = frozenset({"class_attention"})
    default_ratio = None  # outliers say how many
    presets = MappingProxyType({"published": {"plus": True, "spacing": "stride"}})

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
        besides = None
        if self.stated_budget:
            strata = view.strata  # [B, S]
            limit = scoring.limits(self.budget, strata)  # [B, S]
            even = limit * share.numerator // share.denominator  # [B, S]
        else:
            # Each image is a stratum. A sample without an image sees everything, which is one stratum, too.
            strata = torch.where(view.strata >= 0, view.groups + 1, -1)
            patches = torch.where(classes, -1, strata)  # [B, S]
            found = self._outliers(paid[:, 0], patches)  # [B, S]
            limit = torch.where(strata >= 0, scoring.stratum_sizes(strata, found).clamp(min=1), 0)
            if self.spacing == "stride":
                even = torch.zeros_like(limit)
                besides = _on_stride(patches, scoring.stratum_sizes(patches) // limit.clamp(min=1) // 3)
            else:
                more = share / (1 - share)
                even = limit * more.numerator // more.denominator
            if self.class_tokens == "keep":
                limit = limit + scoring.stratum_sizes(strata, classes)
            limit = limit + even
        if self.class_tokens == "keep":
            paid = paid + 2 * classes[:, None]  # attention is at most 1
        scores, _ = scoring.share_evenly(paid, view.visibility, strata, limit, even)  # [B, 1, S]
        kept = scoring.keep_top(scores, strata, limit, view.visibility)
        return kept if besides is None else kept | besides[:, None]

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
        if self.spacing == "stride" and (self.stated_budget or not self.plus):
            raise PolicyOptionError(
                f"spacing='stride' keeps as many tokens as outliers say besides these, so it needs plus=True "
                f"and no budget, got plus={self.plus!r} and {dict(self.stated_budget)!r}"
            )

    fidelity = "adapted"
    paper = "arXiv 2403.15388 (LLaVA-PruMerge)"
    deviations = """
    ``preset=published`` keeps the tokens that the published ``forward()`` keeps, for one image of one tile.
    Merging differs. The original adds to each kept token the 32 tokens most similar to it, other kept ones
    among them, so that a token may be added to several or to none; and it keeps one more token, the weighted
    sum of all that are dropped. Here each dropped token is added to exactly one. The weights are class
    attention, which adds up to 1 in a tile, so both add little, and less in larger images: on random queries
    and keys the published form changes a kept token by 1.4 % of its length (576 patches); here it is 0.4 %,
    and 0.03 % at 6400 patches.

    The original's class attention is that of one head over the full width of queries and keys; here it is
    summed over heads, and scaled to add up to 1 in each tile. Similarity is that of projected features, not
    of the encoder's keys. Each image has its own number of kept tokens, whatever the batch. A token is never
    added to one of another image, or to one that other text rows see. The best token of each image stays even
    if none stands out. Class tokens are neither added nor added to.
    """
    differs = (
        "not plus by default; a dropped token joins one kept token; in the original each kept one gets 32"
    )
    checked_against = (
        "same kept sets as 42Shawn/LLaVA-PruMerge@097c041 (clip_encoder.py), with plus at preset=published; "
        "merging differs"
    )
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


def _on_stride(cells: Tensor, step: Tensor) -> Tensor:
    """Mark every n-th column of each cell from its first, but not its last column, bool ``[B, S]``.

    Args:
        cells: int64 ``[B, S]``; columns of cell -1 are not marked.
        step: int64 ``[B, S]``, n of each column's cell; 0 counts as 1.
    """
    position = scoring.rank_within(torch.zeros_like(cells, dtype=torch.float32)[:, None], cells)[:, 0]
    before_last = position < scoring.stratum_sizes(cells) - 1  # the original stops at 575 of 576
    return (cells >= 0) & before_last & (position % step.clamp(min=1) == 0)
