"""Policies that share one budget out among layers; a scorer says which tokens a layer keeps of its share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
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
    """Shares the budget of all layers out among them, when all have attended.

    All layers together keep exactly what they would if each kept ``keep_ratio`` of its visible tokens. A
    subclass says in ``urgency`` how much the i-th best token of each layer is wanted, from what ``measure``
    found in each layer; see `kvprune.scoring.apportionment`. The heads of a layer keep equally many.

    Args:
        keep_ratio: Fraction of visible tokens kept, mean over layers, in (0, 1]; 0.5 if neither this nor
            keep_tokens is given.
        keep_tokens: Number of visible tokens kept in a layer, mean over layers, instead of a fraction.
        scorer: Ranks the tokens of each layer; it decides nothing about budgets. None: the method's own
            ranking, where it has one.
    """

    scorer: ScoringPolicy | None = None

    budget_scope: ClassVar[Literal["head", "layer", "model"]] = "model"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scorer is not None:
            require_scorer(self.name, self.scorer)

    @property
    def needs(self) -> frozenset[Need]:
        """What the scorer needs; subclasses add what they measure."""
        return frozenset() if self.scorer is None else self.scorer.needs

    def measure(self, view: LayerView) -> Tensor:
        """Return what the share of this layer depends on, ``[B, N]``, alike in all layers; nothing here."""
        return torch.zeros(view.batch, 0, device=view.device)

    def rank(self, view: LayerView, measured: Tensor) -> Tensor:
        """Return scores ``[B, Hkv or 1, S]`` of this layer's tokens: the scorer's.

        Args:
            view: Of the layer.
            measured: What ``measure`` returned, for rankings that are made of it.
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
            visible: int64 ``[B, L]``, tokens that decoding sees.
            columns: Number of tokens for which urgencies are wanted; those beyond ``visible`` do not matter.
        """

    def least(self, even: Tensor, visible: Tensor) -> Tensor:
        """Return how many tokens a layer keeps at least, int64 ``[B, L]``; one of each group stays anyway.

        Args:
            even: int64 ``[B, L]``, what each layer would keep if all kept alike; the most that may be
                returned.
            visible: int64 ``[B, L]``, tokens that decoding sees.
        """
        return torch.zeros_like(even)

    def note(self, measured: Tensor, least: Tensor, visible: Tensor, total: Tensor) -> str:
        """Return what a user should know about how the budget was shared out, or ""."""
        return ""

    def observe(self, view: LayerView) -> tuple[Tensor, Tensor]:
        """Measure and rank."""
        measured = self.measure(view)
        by = self.name if self.scorer is None else self.scorer.name
        return measured, check_scores(self.rank(view, measured), view, view.decode_strata, by)

    def conclude(
        self, views: Sequence[LayerView], observed: Sequence[tuple[Tensor, Tensor]]
    ) -> list[Decision]:
        """Share the budget out, and keep the best tokens of each layer."""
        device = views[0].device
        strata = [view.decode_strata for view in views]
        visible = torch.stack([(of_layer >= 0).sum(-1).to(device) for of_layer in strata], dim=1)
        groups = torch.stack(
            [
                scoring.group_counts(of_layer, view.visibility).to(device)
                for of_layer, view in zip(strata, views, strict=True)
            ],
            dim=1,
        )
        measured = torch.stack([of_layer.to(device) for of_layer, _ in observed], dim=1)
        even = each(self.budget.resolve, visible)
        least = self.least(even, visible).maximum(groups)
        total = even.sum(-1)
        counts = apportion(self.urgency(measured, visible, views[0].columns), least, visible, total)
        decisions = []
        for number, view in enumerate(views):
            scores = observed[number][1]
            limit = counts[:, number, None].to(scores.device).expand(-1, view.columns)
            kept = scoring.keep_top(scores, strata[number], limit, view.visibility)
            note = self.note(measured, least, visible, total) if number == 0 else ""
            decisions.append(Decision(cache=Selection.from_mask(kept), note=note))
        return decisions


@dataclass(frozen=True, kw_only=True)
class ProportionalAllocator(LayerAllocator):
    """Shares the budget out in proportion to a weight of each layer."""

    @abstractmethod
    def weights(self, measured: Tensor) -> Tensor:
        """Return weights ``[B, L]``, none negative, from ``measured`` ``[B, L, N]``.

        They must not depend on the budget. Where all of a sample are 0, its layers keep the same.
        """

    def urgency(self, measured: Tensor, visible: Tensor, columns: int) -> Tensor:
        """Return urgencies in proportion to the weights."""
        return proportional(self.weights(measured), columns)

    def note(self, measured: Tensor, least: Tensor, visible: Tensor, total: Tensor) -> str:
        """Say so if shares could not be met."""
        if not bool(is_clamped(self.weights(measured), least, visible, total)):
            return ""
        return (
            "some layer's share of the budget was more than all its visible tokens, or less than the fewest "
            "that a layer keeps; what was over or missing was shared among the other layers"
        )
