"""`answer-attention`: a reference that looks at the answer, and no method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kvprune import Decision, FeatureScoringPolicy, FeatureView, LayerView, Selection, scoring


@dataclass(frozen=True, kw_only=True)
class AnswerAttention(FeatureScoringPolicy):
    """Keep the tokens to which the full cache's own answer attends most.

    A reference, not a method: the model has answered already, with the full cache, and the rows that
    predicted this answer rank the tokens (``kvprune.session.answer_guide.answer_attention``). All layers and
    heads share one ranking. How far a method stays behind says how much a perfect look at the answer would
    help at the same budget. The difference may be negative: the tokens that get most attention need not be
    those that matter most.

    Without guidance that was made from an answer, the policy is refused.

    Args:
        reach: "onward": tokens are dropped before the first cross-attention layer, so no row of the prompt
            and none of the answer sees them. "layer": prefill sees all tokens, and each layer's cache is
            pruned after its attention, so only decoding misses them.
    """

    reach: Literal["onward", "layer"] = "onward"

    name = "answer-attention"
    version = 1
    reads_answer = True
    needs = frozenset({"guidance"})

    def score(self, view: FeatureView) -> Tensor:
        """Score tokens by the attention of the rows that predict the answer, ``[B, 1, S]``."""
        return view.guidance[:, None]

    def choose(self, view: FeatureView) -> Decision:
        """Decide for all layers, unless each layer is to prune its own cache."""
        return super().choose(view) if self.reach == "onward" else Decision()

    def select(self, view: LayerView) -> Decision:
        """Prune one layer's cache, by the ranking that all layers share."""
        if self.reach == "onward":
            return Decision()
        strata = view.decode_strata  # [B, S], only what decoding can see
        limit = scoring.limits(self.budget, strata)  # [B, S]
        kept = scoring.keep_top(view.guidance[:, None], strata, limit, view.visibility)  # [B, 1, S]
        return Decision(cache=Selection.from_mask(kept))

    cost = (
        "a whole generation with the full cache, one forward call over prompt and answer, and one product of "
        "queries and keys in each of its cross-attention layers"
    )
