"""Base classes of policies that decide at other moments than right after one layer's attention.

moment    when                                    what is called                   with
features  before the first cross-attention layer  FeaturePolicy.choose             FeatureView
layer     right after one layer's attention       CrossKVPolicy.select             LayerView
          right after the text's self-attention   CrossKVPolicy.select_text        TextView
prefill   when all layers have attended           PrefillPolicy.observe, conclude  LayerViews
step      in each decode step, before attention   DecodePolicy.attend              StepView

`DecodePolicy` is in `kvprune.policy.decode`.

A new moment takes three things: a view of what is known then (in `kvprune.policy.view`), a base class here
with one abstract method that gets this view, and one call of that method in `kvprune.engine`. The base class
names the moment and leaves ``select`` without a decision, as `FeaturePolicy` does.
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

    No layer projects, attends to or stores what it drops. No other moment makes the first layer's prefill
    cheaper. There are no queries yet, so the policy does not know the question. ``select`` is still called at
    each layer with the columns that are left; it decides nothing unless overridden.
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
        limit = scoring.limits(self.budget, view.strata)  # [B, S]
        kept = scoring.keep_top(scores, view.strata, limit, view.visibility)  # [B, 1, S]
        return Decision(onward=Selection.from_mask(kept))


@dataclass(frozen=True, kw_only=True)
class PrefillPolicy(CrossKVPolicy):
    """Decides about all layers at once, when the last of them has attended.

    ``observe`` is called for each layer right after its attention; what it returns should be small. All
    layers keep all their tokens until ``conclude`` has decided, so prefill computes and holds what it would
    without compression.
    """

    moment: ClassVar[str] = "prefill"

    @abstractmethod
    def observe(self, view: LayerView) -> Any:
        """Return what ``conclude`` must know about one layer. Pure, as ``select`` is."""

    @abstractmethod
    def conclude(self, views: Sequence[LayerView], observed: Sequence[Any]) -> Sequence[Decision]:
        """Decide about the cache of each layer.

        Args:
            views: The layers' views, in order, without what was captured beyond keys and values.
            observed: What ``observe`` returned for each of them.

        Returns:
            One ``Decision(cache=...)`` for each layer, in the same order; none may decide ``onward``.
        """

    @typing.final
    def select(self, view: LayerView) -> Decision:
        """Decide about one layer as if it were the model's only one."""
        (decision,) = self.conclude([view], [self.observe(view)])
        return decision
