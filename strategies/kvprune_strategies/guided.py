"""`guided`: another model says which tokens matter (SGL)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from kvprune import Budget, Decision, FeatureScoringPolicy, FeatureView, LayerView, Selection, scoring
from kvprune.errors import PolicyOptionError


@dataclass(frozen=True, kw_only=True)
class Guided(FeatureScoringPolicy):
    """Keep the tokens to which a guide attends most.

    A guide (``kvprune.compress(model, "guided", guide=small_model)``) reads the prompt first. A token's
    importance is the attention that it receives, summed over the guide's cross-attention layers, heads and
    text rows. All heads and layers of the model share one ranking. Without a guide, the model guides itself
    in an extra forward pass. That costs more than it saves, and shows what an ideal guide could achieve.

    If the first ``start`` of L cross-attention layers keep everything, the mean share of tokens kept is
    ``start / L + (1 - start / L) * keep_ratio``. With ``start=0``, no layer projects, attends to or stores
    what is dropped, not even in prefill. The guide runs inside the forward call, so times measured around it
    (``kvprune compare``) include the guide. The receipt has its seconds, calls, tokens and bytes.

    Args:
        keep_ratio: Fraction of visible tokens kept from layer ``start`` on; 0.5 if neither this nor
            keep_tokens is given.
        keep_tokens: Number of visible tokens kept there, instead of a fraction.
        start: How many of the first cross-attention layers keep everything. A fraction, such as 0.3, is that
            part of them, rounded down. If it is all layers or more, nothing is dropped.
    """

    start: int | float = 0

    name = "guided"
    version = 1
    needs = frozenset({"guidance"})
    presets = MappingProxyType(
        {
            "published": {"start": 0.3, "keep_ratio": 0.3},
            "script": {"start": 0.4, "keep_ratio": 0.4},
        }
    )

    def score(self, view: FeatureView) -> Tensor:
        """Score tokens by their importance to the guide, ``[B, 1, S]``."""
        return view.guidance[:, None]

    def choose(self, view: FeatureView) -> Decision:
        """Decide for all layers, if none keeps everything."""
        return super().choose(view) if self._whole(view) == 0 else Decision()

    def select(self, view: LayerView) -> Decision:
        """Decide for later layers at the last one that keeps everything."""
        if view.rank != self._whole(view) - 1:
            return Decision()
        limit = scoring.limits(self.budget, view.strata)  # [B, S]
        kept = scoring.keep_top(view.guidance[:, None], view.strata, limit, view.visibility)  # [B, 1, S]
        return Decision(onward=Selection.from_mask(kept))

    def _whole(self, view: FeatureView | LayerView) -> int:
        """Return how many of the first layers keep everything."""
        return int(view.num_layers * self.start) if isinstance(self.start, float) else self.start

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start < 0 or (isinstance(self.start, float) and self.start >= 1):
            raise PolicyOptionError(
                "start is a fraction of the cross-attention layers below 1, or how many of the first ones "
                f"keep everything, 0 or more, got {self.start!r}"
            )

    @property
    def exact_budget(self) -> Budget | None:
        """The budget; None where the first layers keep everything."""
        return super().exact_budget if self.start == 0 else None

    @property
    def requested(self) -> Mapping[str, float | int]:
        """What is kept from layer ``start`` on, and ``start`` unless it is 0."""
        return super().requested if self.start == 0 else {**super().requested, "start": self.start}

    fidelity = "adapted"
    paper = "arXiv 2412.03324 (SGL: small model guidance)"
    deviations = """
    The method was made for decoder-only models; here tokens are dropped from cross-attention, and ``start``
    counts cross-attention layers. The defaults are not those of the published code: that keeps the first 0.3
    of the layers whole and 0.3 of the tokens (``preset=published``; its example script has 0.4 and 0.4,
    ``preset=script``), and the guide's answer counts, too, for which the guide must be
    ``kvprune.Guide(model, max_new_tokens=...)``. Here the defaults are ``start=0`` and the prompt alone.

    The original also counts the row of the image's last token, which has no like here. Only those rows of the
    prompt count that see the token's image, so prompts may have several images. The last token of an answer
    has no row. The number of tokens is rounded up, in the original down. The best token of each image always
    stays. The early exit is `kvprune.guided_generate`.
    """
    differs = (
        "by default all layers drop and only the prompt votes; SGL: layers from 0.3 on, and the answer votes"
    )
    checked_against = (
        "same sets as NUS-HPC-AI-Lab/SGL@7e76fd2 (modeling_llama.py) at preset=published and preset=script, "
        "answers included"
    )
    cost = (
        "the guide: one forward call over the prompt, and one product of queries and keys in each of its "
        "cross-attention layers; with an answer, generating it and one more call"
    )
    bibtex = """@misc{guided2024,
  title = {A Stitch in Time Saves Nine: Small {VLM} is a Precise Guidance for Accelerating Large {VLMs}},
  author = {Zhao, Wangbo and others},
  eprint = {2412.03324},
  archivePrefix = {arXiv},
  year = {2024},
}"""
