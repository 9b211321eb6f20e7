"""`answer-attention`: a reference that looks at the answer, and no method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kvprune import LayerView, ScoringPolicy


@dataclass(frozen=True, kw_only=True)
class AnswerAttention(ScoringPolicy):
    """Keep the tokens to which the full cache's own answer attends most.

    A reference, not a method: the model has answered already, with the full cache, and the rows that
    predicted this answer rank the tokens (``kvprune.answer_attention``). All layers and
    heads share one ranking. How far a method stays behind says how much a perfect look at the answer would
    help at the same budget. The difference may be negative: the tokens that get most attention need not be
    those that matter most.

    Without guidance that was made from an answer, the policy is refused.

    Args:
        reach: "onward": the first cross-attention layer attends to all tokens in prefill, and everything
            after that reads only those that are kept: the later layers, and decoding. That is what methods
            with this reach do. "layer": prefill sees all tokens in all layers, and only decoding misses some.
    """

    reach: Literal["layer", "onward"] = "onward"

    name = "answer-attention"
    version = 1
    reads_answer = True
    needs = frozenset({"guidance"})

    def score(self, view: LayerView) -> Tensor:
        """Score tokens by the attention of the rows that predict the answer, ``[B, 1, S]``."""
        return view.guidance[:, None]

    cost = (
        "a whole generation with the full cache, one forward call over prompt and answer, and one product of "
        "queries and keys in each of its cross-attention layers"
    )
