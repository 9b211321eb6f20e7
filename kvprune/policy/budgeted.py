"""Policies with a budget, and those that rank tokens by a score."""

from __future__ import annotations

import typing
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvprune import scoring
from kvprune.policy.base import CrossKVPolicy, _Unstated
from kvprune.policy.checks import check_scores
from kvprune.policy.view import LayerView, View
from kvprune.tokens.budget import Budget
from kvprune.tokens.decision import Decision
from kvprune.tokens.selection import Selection

__all__ = ["BudgetPolicy", "ScoringPolicy", "onward_decision"]


@dataclass(frozen=True, kw_only=True)
class BudgetPolicy(CrossKVPolicy):
    """Ranks tokens and keeps exactly as many as the budget says.

    Args:
        keep_ratio: Fraction of visible tokens kept, in (0, 1]; 0.5 if neither this nor keep_tokens is given.
        keep_tokens: Number of visible tokens kept, instead of a fraction.
    """

    keep_ratio: float | None = None
    keep_tokens: int | None = None

    ranks_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.keep_tokens is not None and isinstance(self.keep_ratio, _Unstated):
            object.__setattr__(self, "keep_ratio", None)  # replace() of a policy that stated nothing
        elif self.keep_tokens is None and self.keep_ratio is None:
            object.__setattr__(self, "keep_ratio", _Unstated(0.5))
        super().__post_init__()
        self.budget  # noqa: B018  raises on an impossible budget

    @property
    def budget(self) -> Budget:
        """The budget that the options state."""
        return Budget(keep_ratio=self.keep_ratio, keep_tokens=self.keep_tokens)

    @property
    def exact_budget(self) -> Budget | None:
        """The budget that the options state; over what it is exact, `budget_scope` says."""
        return self.budget


@dataclass(frozen=True, kw_only=True)
class ScoringPolicy(BudgetPolicy):
    """Keeps the tokens that score highest, exactly as many as the budget says.

    Args:
        reach: What the scores decide about. "layer": each layer scores its own tokens after its attention
            and prunes its own cache, so prefill and the first generated token are untouched; heads may keep
            different tokens. "onward": the first cross-attention layer decides for itself and for
            all later ones, which then project, attend to and store only survivors; scores are averaged over
            heads.
    """

    reach: Literal["layer", "onward"] = "layer"

    @abstractmethod
    def score(self, view: LayerView) -> Tensor:
        """Return scores ``[B, Hkv, S]`` or ``[B, 1, S]``, higher = keep; unseen columns do not matter."""

    @typing.final
    def select(self, view: LayerView) -> Decision:
        """Keep the columns with the highest scores (KV02: exactly the budget, for each sample and head)."""
        if self.reach == "onward":
            if view.rank > 0:
                return Decision()
            scores = scoring.pool_heads(self.checked_scores(view, view.strata))
            return onward_decision(view, self._keep(scores, view.strata, view))
        strata = view.decode_strata  # only what decoding can see
        scores = self.checked_scores(view, strata)
        return Decision(cache=Selection.from_mask(self._keep(scores, strata, view)))

    def _keep(self, scores: Tensor, strata: Tensor, view: LayerView) -> Tensor:
        return scoring.keep_top(scores, strata, scoring.limits(self.budget, strata), view.visibility)

    def checked_scores(self, view: LayerView, strata: Tensor) -> Tensor:
        """Score, and refuse what cannot rank tokens; what a policy around this one asks for.

        Args:
            view: As ``select`` gets it.
            strata: int64 ``[B, S]``; scores of columns of stratum -1 may be anything, and are set to the
                lowest value.

        Returns:
            ``[B, Hkv, S]`` or ``[B, 1, S]``, float32 or float64, finite.

        Raises:
            ScoreError: If ``score`` returned another shape, type or device, or NaN for a column that counts.
        """
        return check_scores(self.score(view), view, strata, self.name)


def onward_decision(view: View, kept: Tensor, *, crop_here: bool = True) -> Decision:
    """Return the decision that later layers receive only ``kept`` columns.

    Args:
        view: What the decision was made from.
        kept: bool ``[B, 1, S]``.
        crop_here: Whether the cache of the deciding layer keeps only these, too (those that decoding sees).
    """
    onward = Selection.from_mask(kept)
    if not crop_here:
        return Decision(onward=onward)
    decode = view.visible[:, None]
    here = kept & (decode | ~decode.any(-1, keepdim=True))
    return Decision(cache=Selection.from_mask(here), onward=onward)
