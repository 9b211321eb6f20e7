"""`visionzip`: the tokens that the vision encoder's class token attends to, and summaries of the others."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvprune import Decision, FeatureScoringPolicy, FeatureView, Selection, scoring
from kvprune.errors import PolicyOptionError
from kvprune.policy import check_scores, merge_mean, merge_weighted


@dataclass(frozen=True, kw_only=True)
class VisionZip(FeatureScoringPolicy):
    """Keep the tokens with most class attention as they are, and merge all others into a few.

    Class attention is what the class token of a tile pays to the patches of that tile in one layer of the
    vision encoder, added up over heads. The tokens that receive most of it are dominant. Of the rest, some
    that are spread evenly are targets; each other one joins the target that it is most alike (cosine of
    features), and targets become sums: contextual tokens. It knows nothing of the question, and decides
    before the first cross-attention layer.

    Args:
        dominant: Share of the budget that dominant tokens have, rounded up, in (0, 1]; the others are
            contextual. The default is 54 of 64.
        merge: "avg" makes a contextual token the mean of the target and all that joined it. "sum" is the
            original's: the target plus the mean of those that joined it. Keys have a norm of their own
            afterwards in Mllama, but values become up to twice as long.
        class_tokens: "keep" counts class tokens as dominant, before all patches. "rank" leaves them the
            attention of 0 that they have here, so they stay last of all.

    Deviations: Mllama has a class token in each tile, which attends over all tiles; the weights within its
    own tile are scaled to add up to 1, and compared across tiles and images. The layer is the last of the
    vision encoder's global part, whose output the text model receives, where the original takes the second
    last of CLIP for the same reason. Likeness is that of projected features and not of the encoder's keys.
    Targets are even in an order that makes a larger budget keep a superset, and not each n-th of the rest.
    Nothing joins a target of another image, or one that other text rows see; what finds no target there is
    dropped. Class tokens neither join nor take others.
    """

    dominant: float = 0.84
    merge: Literal["avg", "sum"] = "avg"
    class_tokens: Literal["keep", "rank"] = "keep"

    name: ClassVar[str] = "visionzip"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2412.04467 (VisionZip)"
    fidelity: ClassVar[str] = "adapted"
    cost: ClassVar[str] = (
        "class rows of one encoder layer's attention; C products for each pair of target and dropped token; "
        "24 MiB; some transfers to the host for each image"
    )
    bibtex: ClassVar[str] = """@misc{visionzip2024,
  title = {{VisionZip}: Longer is Better but Not Necessary in Vision Language Models},
  author = {Yang, Senqiao and others},
  year = {2024},
  eprint = {2412.04467},
  archivePrefix = {arXiv},
}"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.dominant <= 1:
            raise PolicyOptionError(f"dominant is a share of the budget in (0, 1], got {self.dominant!r}")

    @property
    def needs(self) -> frozenset[Literal["class_attention"]]:
        """What class tokens attend to."""
        return frozenset({"class_attention"})

    def score(self, view: FeatureView) -> Tensor:
        """Return the rank by class attention in (0, 1), plus 1 for what is kept, plus 1 for what must be."""
        return self._parts(view)[0]

    def choose(self, view: FeatureView) -> Decision:
        """Keep dominant tokens and targets, and merge the others into targets."""
        strata = view.strata
        scores, dominant = self._parts(view)
        kept = scoring.keep_top(scores, strata, scoring.limits(self.budget, strata), view.visibility)
        patches = (
            ~view.layout.class_tokens if view.layout.class_tokens is not None else torch.ones_like(dominant)
        )
        takers = kept[:, 0] & ~dominant & patches
        cells = torch.where((strata >= 0) & patches, view.groups, -1)
        joined = scoring.most_alike(view.features, takers, ~kept[:, 0], cells)
        if not bool((joined >= 0).any()):
            return Decision(onward=Selection.from_mask(kept))
        columns = torch.arange(view.columns, device=view.device)
        buckets = torch.where(kept, columns, joined[:, None])
        if self.merge == "avg":
            return Decision(onward=merge_mean(kept, buckets))
        return Decision(onward=merge_weighted(kept, buckets, _target_and_mean(joined)[:, None]))

    def _parts(self, view: FeatureView) -> tuple[Tensor, Tensor]:
        """Return scores ``[B, 1, S]``, and what is dominant as long as no image starves, bool ``[B, S]``."""
        strata = view.strata
        paid = view.class_attention[:, None]
        if self.class_tokens == "keep" and view.layout.class_tokens is not None:
            paid = paid + 2 * view.layout.class_tokens[:, None]  # attention is at most 1
        paid = check_scores(paid, view, strata, self.name)
        limit = scoring.limits(self.budget, strata)
        rest = 1 - Fraction(str(self.dominant))
        return scoring.share_evenly(
            paid, view.visibility, strata, limit, limit * rest.numerator // rest.denominator
        )


def _target_and_mean(joined: Tensor) -> Tensor:
    """Return weights ``[B, S]``: 1 for what stays, 1 / n for each of n that join one target."""
    counts = torch.zeros_like(joined).scatter_add_(-1, joined.clamp(min=0), (joined >= 0).to(torch.int64))
    shares = 1 / counts.gather(-1, joined.clamp(min=0)).clamp(min=1).double()
    return torch.where(joined >= 0, shares, 1)
