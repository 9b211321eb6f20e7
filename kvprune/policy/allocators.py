"""Policies that share one budget among all layers, and in which a scorer ranks the tokens of each layer.

A subclass of `LayerAllocator` measures each layer and says how urgently its i-th best token is wanted.
`ProportionalAllocator` asks for a weight of each layer instead.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvprune import scoring
from kvprune.errors import PolicyOptionError
from kvprune.policy.base import Need
from kvprune.policy.budgeted import BudgetPolicy, ScoringPolicy
from kvprune.policy.checks import check_scores
from kvprune.policy.moments import PrefillPolicy
from kvprune.policy.nesting import require_scorer
from kvprune.policy.view import LayerView
from kvprune.scoring.apportionment import apportion, each, is_clamped, proportional
from kvprune.tokens.decision import Decision
from kvprune.tokens.selection import Selection

__all__ = ["LayerAllocator", "ProportionalAllocator"]


@dataclass(frozen=True, kw_only=True)
class LayerAllocator(BudgetPolicy, PrefillPolicy):
    """Shares one budget among all layers, when all have attended.

    All layers together keep exactly what they would if each kept ``keep_ratio`` of its visible tokens. A
    subclass says in ``urgency`` how urgently the i-th best token of each layer is wanted, from what
    ``measure`` returned for each layer; see `kvprune.scoring.apportion`. The heads of a layer keep equally
    many.

    Args:
        keep_ratio: Fraction of visible tokens kept, mean over layers, in (0, 1]; 0.5 if neither this nor
            keep_tokens is given.
        keep_tokens: Number of visible tokens kept in a layer, mean over layers, instead of a fraction.
        scorer: Ranks the tokens of each layer; it decides nothing about budgets. None: the method's own
            ranking, where it has one.

    Class attributes:
        measure_needs: What ``measure`` needs; the policy needs this and what its scorer needs.
    """

    scorer: ScoringPolicy | None = None

    budget_scope: ClassVar[Literal["head", "layer", "model"]] = "model"
    measure_needs: ClassVar[frozenset[Need]] = frozenset()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scorer is not None:
            require_scorer(self.name, self.scorer)

    @property
    def needs(self) -> frozenset[Need]:
        """What ``measure`` needs, and what the scorer needs."""
        return self.measure_needs if self.scorer is None else self.measure_needs | self.scorer.needs

    def measure(self, view: LayerView) -> Tensor:
        """Return N numbers on which the share of this layer depends, ``[B, N]``; none by default."""
        return torch.zeros(view.batch, 0, device=view.device)

    def rank(self, view: LayerView, measured: Tensor) -> Tensor:
        """Return scores ``[B, Hkv or 1, S]`` of this layer's tokens: by default the scorer's.

        Args:
            view: View of the layer.
            measured: What ``measure`` returned, for methods that rank by it.

        Raises:
            PolicyOptionError: If there is no scorer.
        """
        if self.scorer is None:
            raise PolicyOptionError(f"policy {self.name!r} has no ranking of its own; give it a scorer")
        return self.scorer.score(view)

    @abstractmethod
    def urgency(self, measured: Tensor, visible: Tensor, columns: int) -> Tensor:
        """Return how urgent the i-th best token of each layer is, ``[B, L, columns]``, falling along i.

        It must not depend on the budget, or a larger one might not keep a superset.

        Args:
            measured: ``[B, L, N]``, what ``measure`` returned for each layer.
            visible: int64 ``[B, L]``, number of tokens that decoding sees.
            columns: For how many tokens i to return urgencies; those beyond ``visible`` do not matter.
        """

    def least(self, even: Tensor, visible: Tensor) -> Tensor:
        """Return how many tokens a layer keeps at least, int64 ``[B, L]``; 0 by default.

        One token of each visibility group stays in any case.

        Args:
            even: int64 ``[B, L]``, what each layer would keep if all kept alike. Return no more than that.
            visible: int64 ``[B, L]``, number of tokens that decoding sees.
        """
        return torch.zeros_like(even)

    def note(self, measured: Tensor, least: Tensor, visible: Tensor, total: Tensor) -> str:
        """Return what a user should know about how the budget was shared, or ""."""
        return ""

    def observe(self, view: LayerView) -> tuple[Tensor, Tensor]:
        """Return what is measured ``[B, N]`` and the checked scores ``[B, Hkv or 1, S]`` of one layer."""
        measured = self.measure(view)
        ranked_by = self.name if self.scorer is None else self.scorer.name
        return measured, check_scores(self.rank(view, measured), view, view.decode_strata, ranked_by)

    def conclude(
        self, views: Sequence[LayerView], observed: Sequence[tuple[Tensor, Tensor]]
    ) -> list[Decision]:
        """Share the budget, and keep the best tokens of each layer."""
        device = views[0].device
        strata = [view.decode_strata for view in views]  # each [B, S]

        def by_layer(counts: Iterable[Tensor]) -> Tensor:  # L tensors [B, ...] to one [B, L, ...]
            return torch.stack([of_layer.to(device) for of_layer in counts], dim=1)

        visible = by_layer((of_layer >= 0).sum(-1) for of_layer in strata)  # [B, L]
        groups = by_layer(
            scoring.group_counts(of_layer, view.visibility)
            for of_layer, view in zip(strata, views, strict=True)
        )  # [B, L]
        measured = by_layer(of_layer for of_layer, _ in observed)  # [B, L, N]
        even = each(self.budget.resolve, visible)  # [B, L]
        least = self.least(even, visible).maximum(groups)  # [B, L]
        total = even.sum(-1)  # [B]
        counts = apportion(self.urgency(measured, visible, views[0].columns), least, visible, total)  # [B, L]
        decisions = []
        for number, view in enumerate(views):
            scores = observed[number][1]
            limit = counts[:, number, None].to(scores.device).expand(-1, view.columns)  # [B, S]
            kept = scoring.keep_top(scores, strata[number], limit, view.visibility)
            note = self.note(measured, least, visible, total) if number == 0 else ""
            decisions.append(Decision(cache=Selection.from_mask(kept), note=note))
        return decisions


@dataclass(frozen=True, kw_only=True)
class ProportionalAllocator(LayerAllocator):
    """Shares the budget in proportion to a weight of each layer."""

    @abstractmethod
    def weights(self, measured: Tensor) -> Tensor:
        """Return weights ``[B, L]``, none negative, from ``measured`` ``[B, L, N]``.

        They must not depend on the budget. If all weights of a sample are 0, its layers keep equally many.
        """

    def urgency(self, measured: Tensor, visible: Tensor, columns: int) -> Tensor:
        """Return urgencies in proportion to the weights."""
        return proportional(self.weights(measured), columns)

    def note(self, measured: Tensor, least: Tensor, visible: Tensor, total: Tensor) -> str:
        """Tell the user if some layer could not get its share."""
        if not bool(is_clamped(self.weights(measured), least, visible, total)):
            return ""
        return (
            "some layer's share of the budget was more than all its visible tokens, or less than the fewest "
            "that a layer keeps; what was over or missing was shared among the other layers"
        )
