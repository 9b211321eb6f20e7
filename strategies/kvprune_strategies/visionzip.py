"""`visionzip`: the tokens with most attention from the class token, and summaries of the others."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from kvprune import BudgetPolicy, Decision, FeaturePolicy, FeatureView, Selection, scoring
from kvprune.errors import PolicyOptionError
from kvprune.policy import check_scores, merge_mean, merge_weighted
from kvprune_strategies.class_attention import class_columns, merge_into_most_similar


@dataclass(frozen=True, kw_only=True)
class VisionZip(BudgetPolicy, FeaturePolicy):
    """Keep the tokens with most class attention as they are, and merge all others into a few.

    Class attention is the attention that the class token of a tile pays to the patches of that tile in one
    layer of the vision encoder, summed over heads. The tokens that receive most of it are dominant. Of the
    rest, some evenly spaced ones are targets. Each other token merges into the most similar target (cosine of
    features), which becomes a contextual token. It knows nothing of the question, and decides before the
    first cross-attention layer.

    Args:
        dominant: Share of the budget for dominant tokens, rounded up, in (0, 1]; the others are contextual.
            The default is 54 of 64, as in the README of the published code. The default of its function is
            191 of 221.
        merge: "avg" makes a contextual token the mean of the target and all that merge into it, which is our
            choice. "sum" is the original's: the target plus the mean of those that merge into it. In Mllama,
            keys are normalised afterwards, but values become up to twice as long.
        targets: Which of the rest are targets. "even": the first ones of an order in which every beginning is
            evenly spaced, so that a larger budget keeps a superset, which is our choice. "stride" is the
            original's: every n-th one, from the first.
        class_tokens: "keep" counts class tokens as dominant, before all patches. "rank" gives them no class
            attention, so they come last.
    """

    dominant: float = 0.84
    merge: Literal["avg", "sum"] = "avg"
    targets: Literal["even", "stride"] = "even"
    class_tokens: Literal["keep", "rank"] = "keep"

    name = "visionzip"
    version = 1
    needs = frozenset({"class_attention"})
    presets = MappingProxyType(
        {
            "published": {"merge": "sum", "targets": "stride"},
            "readme": {"keep_tokens": 64, "merge": "sum", "targets": "stride"},
            "function": {"keep_tokens": 221, "dominant": 0.8641, "merge": "sum", "targets": "stride"},
        }
    )

    @property
    def ranks_tokens(self) -> bool:  # type: ignore[override]  # it depends on an option
        """Whether a larger budget keeps a superset; not with ``targets=stride``."""
        return self.targets == "even"

    def choose(self, view: FeatureView) -> Decision:
        """Keep dominant tokens and targets, and merge the others into targets."""
        strata = view.strata  # [B, S]
        paid = check_scores(view.class_attention[:, None], view, strata, self.name)  # [B, 1, S]
        if self.class_tokens == "keep":
            paid = paid + 2 * class_columns(view)[:, None]  # attention is at most 1
        limit = scoring.limits(self.budget, strata)  # [B, S]
        rest = 1 - Fraction(str(self.dominant))
        even = limit * rest.numerator // rest.denominator  # [B, S]
        scores, dominant = scoring.share_evenly(  # [B, 1, S], [B, S]
            paid, view.visibility, strata, limit, even, stride=self.targets == "stride"
        )
        kept = scoring.keep_top(scores, strata, limit, view.visibility)  # [B, 1, S]
        return merge_into_most_similar(view, kept, kept[:, 0] & ~dominant, self._merge)

    def _merge(self, kept: Tensor, buckets: Tensor) -> Selection:
        if self.merge == "avg":
            return merge_mean(kept, buckets)
        joined = buckets.masked_fill(kept, -1)  # [B, 1, S], the target of what merges
        target = joined.clamp(min=0)
        counts = torch.zeros_like(joined).scatter_add_(-1, target, (joined >= 0).to(torch.int64))
        shares = 1 / counts.gather(-1, target).clamp(min=1).double()  # [B, 1, S]
        return merge_weighted(kept, buckets, torch.where(joined >= 0, shares, 1))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.dominant <= 1:
            raise PolicyOptionError(f"dominant is a share of the budget in (0, 1], got {self.dominant!r}")

    fidelity = "adapted"
    paper = "arXiv 2412.04467 (VisionZip)"
    deviations = """
    ``preset=published`` is the published rule: targets on a stride, each of which becomes the sum of itself
    and the mean of what merges into it; ``readme`` and ``function`` add the published numbers of tokens. For
    one image of one tile, with features in place of the encoder's keys, they keep and merge what the authors'
    code does. The defaults take a mean instead of the sum, and targets spaced evenly in an order in which a
    larger budget keeps a superset.

    The class token of each tile in Mllama attends over all tiles. Its weights within its own tile are scaled
    to add up to 1, and compared across tiles and images. The layer is the last of the vision encoder's global
    part, whose output the text model receives; for the same reason the original takes the second last of
    CLIP. Similarity is that of projected features. A token never merges into a target of another image, or
    into one that other text rows see; without a target it is dropped. Class tokens neither merge nor are
    merged into.
    """
    differs = (
        "defaults take means, not sums, and other targets (preset=published does not); compares features"
    )
    checked_against = (
        "same tokens, targets and merges as dvlab-research/VisionZip@3151f6d (clip_encoder.py) at "
        "preset=published, with features in place of keys"
    )
    cost = (
        "class rows of one encoder layer's attention; C products for each pair of target and dropped token; "
        "24 MiB; some transfers to the host for each image"
    )
    bibtex = """@misc{visionzip2024,
  title = {{VisionZip}: Longer is Better but Not Necessary in Vision Language Models},
  author = {Yang, Senqiao and others},
  year = {2024},
  eprint = {2412.04467},
  archivePrefix = {arXiv},
}"""
