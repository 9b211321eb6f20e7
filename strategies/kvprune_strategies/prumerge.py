"""`prumerge`: as many tokens as stand out in the class token's attention, which absorb the others."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvprune import Budget, Decision, FeaturePolicy, FeatureView, Selection, scoring
from kvprune.errors import BudgetError, PolicyOptionError
from kvprune.policy import check_scores, merge_weighted


@dataclass(frozen=True, kw_only=True)
class PruMerge(FeaturePolicy):
    """Keep the tokens whose class attention is an outlier, and add the others to them.

    Class attention is what the class token of a tile pays to the patches of that tile in one layer of the
    vision encoder. A token stands out if it receives more than Q3 + 1.5 (Q3 - Q1), with the quartiles Q1 and
    Q3 of its image; so the number of tokens kept depends on the image. Each other token is added to the kept
    token that it is most alike (cosine of features), weighted with its own class attention. It knows nothing
    of the question, and decides before the first cross-attention layer.

    Args:
        keep_ratio: Equal-budget mode: exactly this fraction of visible tokens is kept, those with most class
            attention. If neither this nor keep_tokens is given, outliers are.
        keep_tokens: Likewise, a number of tokens.
        fence: How many times Q3 - Q1 an outlier lies beyond Q3, at least 0.
        plus: PruMerge+: tokens that are spread evenly are kept besides, before anything is merged.
        spread: With plus, share of the kept tokens that is spread evenly, in [0, 1): by default, three for
            each outlier. The number is ours.
        merge: "sum" adds weighted tokens to the kept one, which has the weight 1. "avg" is the mean of all,
            weighted with class attention.
        class_tokens: "rank" leaves class tokens the attention of 0 that they have here, so they go first.
            "keep" puts them before all patches; they come on top of outliers, but count in a budget.

    Deviations: the original adds to each kept token the 32 that it is most alike, so that one may be added to
    several and another to none, and keeps one more token that is the weighted sum of all that are dropped;
    here, each dropped token is added to exactly one. Its class attention is one head's over the full width of
    queries and keys; here it is added up over heads, and scaled to add up to 1 in each tile. Likeness is that
    of projected features and not of the encoder's keys. Numbers of tokens are those of each image, and never
    of a batch. Nothing is added to a token of another image, or one that other text rows see; the best token
    of each image stays even if none stands out. Class tokens are neither added nor added to.
    """

    keep_ratio: float | None = None
    keep_tokens: int | None = None
    fence: float = 1.5
    plus: bool = False
    spread: float = 0.75
    merge: Literal["sum", "avg"] = "sum"
    class_tokens: Literal["rank", "keep"] = "rank"

    name: ClassVar[str] = "prumerge"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2403.15388 (LLaVA-PruMerge)"
    fidelity: ClassVar[str] = "adapted"
    cost: ClassVar[str] = (
        "class rows of one encoder layer's attention; C products for each pair of kept and dropped token; "
        "24 MiB; some transfers to the host for each image"
    )
    bibtex: ClassVar[str] = """@misc{prumerge2024,
  title = {{LLaVA-PruMerge}: Adaptive Token Reduction for Efficient Large Multimodal Models},
  author = {Shang, Yuzhang and others},
  year = {2024},
  eprint = {2403.15388},
  archivePrefix = {arXiv},
}"""
    ranks_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_ratio is not None and self.keep_tokens is not None:
            raise BudgetError(
                "prumerge takes keep_ratio or keep_tokens, or neither to keep outliers, "
                f"got keep_ratio={self.keep_ratio!r} and keep_tokens={self.keep_tokens!r}"
            )
        self.exact_budget  # noqa: B018  raises on an impossible budget
        if self.fence < 0:
            raise PolicyOptionError(
                f"fence counts distances between quartiles, at least 0, got {self.fence!r}"
            )
        if not 0 <= self.spread < 1:
            raise PolicyOptionError(f"spread is a share of the kept tokens in [0, 1), got {self.spread!r}")

    @property
    def exact_budget(self) -> Budget | None:
        """The budget that the options state; None where outliers decide."""
        if self.keep_ratio is None and self.keep_tokens is None:
            return None
        return Budget(keep_ratio=self.keep_ratio, keep_tokens=self.keep_tokens)

    @property
    def needs(self) -> frozenset[Literal["class_attention"]]:
        """What class tokens attend to."""
        return frozenset({"class_attention"})

    def choose(self, view: FeatureView) -> Decision:
        """Keep what stands out, and add the others to it."""
        classes = view.layout.class_tokens
        classes = torch.zeros_like(view.visible) if classes is None else classes.expand_as(view.visible)
        paid = check_scores(view.class_attention[:, None], view, view.strata, self.name)
        kept = self._kept(view, paid, classes)
        takers, cells = kept[:, 0] & ~classes, torch.where((view.strata >= 0) & ~classes, view.groups, -1)
        joined = scoring.most_alike(view.features, takers, ~kept[:, 0], cells)
        if not bool((joined >= 0).any()):
            return Decision(onward=Selection.from_mask(kept))
        buckets = torch.where(kept[:, 0], torch.arange(view.columns, device=view.device), joined)
        weights = _weights(paid[:, 0].double(), buckets, kept[:, 0], mean=self.merge == "avg")
        return Decision(onward=merge_weighted(kept, buckets[:, None], weights[:, None]))

    def _kept(self, view: FeatureView, paid: Tensor, classes: Tensor) -> Tensor:
        """Return what is kept, bool ``[B, 1, S]``."""
        share = Fraction(str(self.spread)) if self.plus else Fraction(0)
        if self.exact_budget is not None:
            strata = view.strata
            limit = scoring.limits(self.exact_budget, strata)
            back = limit * share.numerator // share.denominator
        else:
            # Each image for itself. A sample without one is shown everything: that is one set, too.
            strata = torch.where(view.strata >= 0, view.groups + 1, -1)
            found = self._outliers(paid[:, 0], torch.where(classes, -1, strata))
            limit = torch.where(strata >= 0, _count(found, strata).clamp(min=1), 0)
            more = share / (1 - share)
            back = limit * more.numerator // more.denominator
            if self.class_tokens == "keep":
                limit = limit + _count(classes, strata)
            limit = limit + back
        if self.class_tokens == "keep":
            paid = paid + 2 * classes[:, None]  # attention is at most 1
        scores, _ = scoring.share_evenly(paid, view.visibility, strata, limit, back)
        return scoring.keep_top(scores, strata, limit, view.visibility)

    def _outliers(self, paid: Tensor, cells: Tensor) -> Tensor:
        """Return which columns lie beyond the fence of their cell, bool ``[B, S]``."""
        found = torch.zeros_like(cells, dtype=torch.bool)
        for sample, columns in scoring.members(cells):
            values = paid[sample, columns].double()
            low, high = values.quantile(values.new_tensor([0.25, 0.75]))
            found[sample, columns] = values > high + self.fence * (high - low)
        return found


def _count(marked: Tensor, strata: Tensor) -> Tensor:
    """Return how many columns of its stratum are marked, for each column; 0 for stratum -1."""
    return scoring.stratum_sizes(strata, marked)


def _weights(paid: Tensor, buckets: Tensor, kept: Tensor, *, mean: bool) -> Tensor:
    """Return the weight of each column in its bucket, float64 ``[B, S]``.

    A bucket that receives no attention at all is its kept token.
    """
    if not mean:
        return torch.where(kept, 1, paid)
    named = buckets.clamp(min=0)
    total = torch.zeros_like(paid).scatter_add_(-1, named, torch.where(buckets >= 0, paid, 0))
    total = total.gather(-1, named)
    return torch.where(total > 0, paid / total, kept.double())
