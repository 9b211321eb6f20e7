"""`guided`: SGL, another model says which tokens matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvprune import Budget, Decision, FeatureScoringPolicy, FeatureView, LayerView, Selection, scoring
from kvprune.errors import PolicyOptionError


@dataclass(frozen=True, kw_only=True)
class Guided(FeatureScoringPolicy):
    """Keep the tokens to which a guide attends most.

    A guide (``kvprune.compress(model, "guided", guide=small_model)``) reads the prompt first; the attention
    that a token receives, summed over the guide's cross-attention layers, heads and text rows, is its
    importance. One ranking serves all heads and layers of the model. Without a guide the model guides itself
    in a pass before, which costs more than it saves and shows what the best of guides could tell.

    Where the first ``start`` of L cross-attention layers keep everything, the mean share of tokens kept is
    ``start / L + (1 - start / L) * keep_ratio``. With ``start=0`` no layer projects, attends to or stores
    what is dropped, prefill included. The guide runs inside the forward call: times that are measured around
    it (``kvprune compare``) include the guide, and the receipt names its seconds, calls, tokens and bytes.

    Args:
        keep_ratio: Fraction of visible tokens kept from layer ``start`` on; 0.5 if neither this nor
            keep_tokens is given.
        keep_tokens: Number of visible tokens kept there, instead of a fraction.
        start: Number of first cross-attention layers that keep everything. From the number of layers on,
            nothing is dropped.

    Deviations: the method was made for decoder-only models; here tokens are dropped from cross-attention, and
    ``start`` counts cross-attention layers. Those rows of the prompt count that see the token's image, which
    makes several images possible. Whether the guide also adds up the rows of its answer is an option of
    `kvprune.Guide`; by default it reads the prompt only. The last token of an answer has no row. The best
    token of each image always stays. The early exit is `kvprune.guided_generate`.
    """

    start: int = 0

    name: ClassVar[str] = "guided"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2412.03324 (SGL: small model guidance)"
    fidelity: ClassVar[str] = "adapted"
    cost: ClassVar[str] = (
        "the guide: one forward call over the prompt, and one product of queries and keys in each of its "
        "cross-attention layers; with an answer, generating it and one more call"
    )
    bibtex: ClassVar[str] = """@misc{guided2024,
  title = {A Stitch in Time Saves Nine: Small {VLM} is a Precise Guidance for Accelerating Large {VLMs}},
  author = {Zhao, Wangbo and others},
  eprint = {2412.03324},
  archivePrefix = {arXiv},
  year = {2024},
}"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start < 0:
            raise PolicyOptionError(
                f"start counts the first cross-attention layers that keep everything, 0 or more, "
                f"got {self.start!r}"
            )

    @property
    def exact_budget(self) -> Budget | None:
        """The budget that the options state; none where the first layers keep everything."""
        return self.budget if self.start == 0 else None

    @property
    def requested(self) -> Mapping[str, float | int]:
        """What is kept from layer ``start`` on, and ``start`` unless it is 0."""
        ratio, tokens = self.keep_ratio, self.keep_tokens
        asked: dict[str, float | int] = {} if ratio is None else {"keep_ratio": ratio}
        asked |= {} if tokens is None else {"keep_tokens": tokens}
        return asked if self.start == 0 else {**asked, "start": self.start}

    @property
    def needs(self) -> frozenset[Literal["guidance"]]:
        """What the guide says."""
        return frozenset({"guidance"})

    def score(self, view: FeatureView) -> Tensor:
        """Score tokens by their importance to the guide, ``[B, 1, S]``."""
        return view.guidance[:, None]

    def choose(self, view: FeatureView) -> Decision:
        """Decide for all layers, unless the first ones keep everything."""
        return super().choose(view) if self.start == 0 else Decision()

    def select(self, view: LayerView) -> Decision:
        """Decide for the later layers after the last one that keeps everything."""
        if self.start == 0 or view.rank != self.start - 1:
            return Decision()
        limit = scoring.limits(self.budget, view.strata)
        kept = scoring.keep_top(view.guidance[:, None], view.strata, limit, view.visibility)
        return Decision(onward=Selection.from_mask(kept))
