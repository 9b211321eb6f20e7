"""Policies that decide at other moments than right after one layer's attention.

features    before the first cross-attention layer     FeaturePolicy.choose
layer       right after one layer's attention          CrossKVPolicy.select
prefill     when all layers have attended              PrefillPolicy.observe and .conclude
"""

from __future__ import annotations

import typing
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from kvprune import scoring
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.budgeted import BudgetPolicy
from kvprune.policy.checks import check_scores
from kvprune.policy.view import FeatureView, LayerView
from kvprune.tokens.decision import Decision
from kvprune.tokens.selection import Selection

__all__ = ["FeaturePolicy", "FeatureScoringPolicy", "PrefillPolicy"]


@dataclass(frozen=True, kw_only=True)
class FeaturePolicy(CrossKVPolicy):
    """Decides from the encoder's features before the first cross-attention layer.

    What it drops is projected, attended to and stored by no layer at all: this is the only moment at which
    the first layer's prefill becomes cheaper, too. There are no queries yet, so it does not know the
    question. ``select`` is still asked at each layer about what is left; unless overridden, it decides
    nothing.
    """

    moment: ClassVar[str] = "features"

    @abstractmethod
    def choose(self, view: FeatureView) -> Decision:
        """Decide what all layers receive: ``Decision(onward=...)``. Pure, as ``select`` is."""

    def select(self, view: LayerView) -> Decision:
        """Decide nothing more."""
        return Decision()


@dataclass(frozen=True, kw_only=True)
class FeatureScoringPolicy(BudgetPolicy, FeaturePolicy):
    """Keeps the tokens whose features score highest, exactly as many as the budget says."""

    @abstractmethod
    def score(self, view: FeatureView) -> Tensor:
        """Return scores ``[B, 1, S]``, higher = keep; unseen columns do not matter."""

    def choose(self, view: FeatureView) -> Decision:
        """Keep the columns with the highest scores (KV02: exactly the budget, for each sample)."""
        scores = check_scores(self.score(view), view, view.strata, self.name)
        limit = scoring.limits(self.budget, view.strata)
        return Decision(
            onward=Selection.from_mask(scoring.keep_top(scores, view.strata, limit, view.visibility))
        )


@dataclass(frozen=True, kw_only=True)
class PrefillPolicy(CrossKVPolicy):
    """Decides about all layers at once, when the last of them has attended.

    Each layer is shown once, right after its attention; what ``observe`` makes of it should be small. All
    layers keep all their tokens until ``conclude``, so prefill is what it would be without compression, and
    needs as much memory.
    """

    moment: ClassVar[str] = "prefill"

    @abstractmethod
    def observe(self, view: LayerView) -> Any:
        """Return what must be known about one layer later. Pure, as ``select`` is."""

    @abstractmethod
    def conclude(self, views: Sequence[LayerView], observed: Sequence[Any]) -> Sequence[Decision]:
        """Decide about the cache of each layer.

        Args:
            views: Of the layers in order, without what was captured beyond keys and values.
            observed: What ``observe`` returned for each of them.

        Returns:
            One decision for each layer, in the same order; none of them says anything about ``onward``.
        """

    @typing.final
    def select(self, view: LayerView) -> Decision:
        """Decide about one layer as if the model had no other."""
        (decision,) = self.conclude([view], [self.observe(view)])
        return decision
