"""Policies with a budget: `BudgetPolicy`, and `ScoringPolicy` for those that rank tokens by a score.

All that policies have in common about budgets is here: the options, their default, and the check that only
one of them is stated.
"""

from __future__ import annotations

import dataclasses
import typing
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from kvprune import scoring
from kvprune.errors import BudgetError
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.checks import check_scores
from kvprune.policy.view import LayerView, View
from kvprune.tokens.budget import Budget
from kvprune.tokens.decision import Decision
from kvprune.tokens.selection import Selection

__all__ = ["BudgetPolicy", "ScoringPolicy", "onward_decision"]


@dataclass(frozen=True, kw_only=True)
class BudgetPolicy(CrossKVPolicy):
    """Ranks tokens and keeps as many as the budget says.

    An option that nobody stated stays None, and ``budget`` fills in the default. Two policies are equal if
    their options are, with the default filled in.

    Args:
        keep_ratio: Fraction of visible tokens kept, in (0, 1]; 0.5 if neither this nor keep_tokens is given.
        keep_tokens: Number of visible tokens kept, instead of a fraction.

    Class attributes:
        default_ratio: The keep_ratio of a policy whose options state no budget. None: the policy then finds
            the number of tokens itself, and has no ``budget``.
        budget_alternatives: Names of options that may be stated in place of keep_ratio and keep_tokens, such
            as ``k_ratio`` of `trim`. Each is None by default, or a fraction in (0, 1], or, if the option is
            an int, such as ``k`` of `meanpool`, a whole number from 1. What such a number is taken of is the
            policy's business, so ``exact_budget`` is None where one is stated, and with a whole number there
            is no ``budget``.
    """

    keep_ratio: float | None = None
    keep_tokens: int | None = None

    ranks_tokens: ClassVar[bool] = True
    default_ratio: ClassVar[float | None] = 0.5
    budget_alternatives: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        stated = self.stated_budget
        if len(stated) > 1:
            options = " or ".join(("keep_ratio", "keep_tokens", *self.budget_alternatives))
            got = " and ".join(f"{name}={value!r}" for name, value in stated.items())
            raise BudgetError(f"policy {self.name!r} takes either {options}, got {got}")
        for name in self.budget_alternatives:
            if name not in stated:
                continue
            if self._is_whole(name):
                if stated[name] < 1:
                    raise BudgetError(
                        f"{name} of policy {self.name!r} is a whole number from 1, got {stated[name]!r}"
                    )
                return
            if not 0 < stated[name] <= 1:
                raise BudgetError(
                    f"{name} of policy {self.name!r} is a fraction in (0, 1], got {stated[name]!r}"
                )
        if stated or self.default_ratio is not None:
            self.budget  # noqa: B018  raises on an impossible budget

    def _is_whole(self, name: str) -> bool:
        """Whether an option holds a whole number, such as cells of k x k, and no fraction."""
        return float not in typing.get_args(self.option_types()[name])

    @property
    def stated_budget(self) -> Mapping[str, float | int]:
        """The option by which somebody stated a budget, by its name; empty where nobody did."""
        names = ("keep_ratio", "keep_tokens", *self.budget_alternatives)
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def budget(self) -> Budget:
        """The budget that the options state, or the default. An alternative counts as a keep_ratio.

        Raises:
            BudgetError: If nothing is stated and there is no default, or a whole number is stated instead.
        """
        if self.keep_tokens is not None:
            return Budget(keep_tokens=self.keep_tokens)
        for name, whole in self.stated_budget.items():
            if name in self.budget_alternatives and self._is_whole(name):
                raise BudgetError(f"policy {self.name!r} states {name}={whole!r} in place of a budget")
        for ratio in (*self.stated_budget.values(), self.default_ratio):
            if ratio is not None:
                return Budget(keep_ratio=ratio)
        raise BudgetError(f"the options of policy {self.name!r} state no budget, and it has no default")

    @property
    def exact_budget(self) -> Budget | None:
        """The budget that what each sample keeps meets exactly (over what, `budget_scope` says), or None."""
        stated = self.stated_budget
        if stated.keys() & set(self.budget_alternatives) or (not stated and self.default_ratio is None):
            return None
        return self.budget

    @property
    def requested(self) -> Mapping[str, float | int]:
        """What the options ask to keep, by name, for receipts."""
        return self.stated_budget or self._default

    @property
    def option_values(self) -> dict[str, Any]:
        """The value of each option by its name, with the default budget filled in."""
        return super().option_values | ({} if self.stated_budget else self._default)

    @property
    def _default(self) -> dict[str, float | int]:
        return {} if self.default_ratio is None else {"keep_ratio": self.default_ratio}

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        # @dataclass would add methods that compare the fields alone; it replaces none that a class has.
        for method in ("__eq__", "__hash__"):
            if method not in cls.__dict__:
                setattr(cls, method, getattr(BudgetPolicy, method))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BudgetPolicy) or type(other) is not type(self):
            return NotImplemented
        return self._compared() == other._compared()

    def __hash__(self) -> int:
        return hash(self._compared())

    def _compared(self) -> tuple[Any, ...]:
        values = self.option_values
        return tuple(values[option.name] for option in dataclasses.fields(self) if option.compare)


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

    def spares(self, view: LayerView) -> bool:
        """Whether a layer keeps everything. A class that spares layers has no ``exact_budget``."""
        return False

    @typing.final
    def select(self, view: LayerView) -> Decision:
        """Keep the columns with the highest scores (KV02: exactly the budget, for each sample and head)."""
        if self.spares(view):
            return Decision()
        if self.reach == "onward":
            if view.rank > 0:
                return Decision()
            scores = scoring.pool_heads(self.checked_scores(view, view.strata))  # [B, 1, S]
            return onward_decision(view, self._keep(scores, view.strata, view))
        strata = view.decode_strata  # [B, S], only what decoding can see
        scores = self.checked_scores(view, strata)  # [B, Hkv or 1, S]
        return Decision(cache=Selection.from_mask(self._keep(scores, strata, view)))

    def _keep(self, scores: Tensor, strata: Tensor, view: LayerView) -> Tensor:
        return scoring.keep_top(scores, strata, scoring.limits(self.budget, strata), view.visibility)

    def checked_scores(self, view: LayerView, strata: Tensor) -> Tensor:
        """Return the scores, checked; policies that have this one as an option call it.

        Args:
            view: As ``select`` gets it.
            strata: int64 ``[B, S]``. Scores of columns of stratum -1 may be anything; they are replaced by
                the lowest value.

        Returns:
            ``[B, Hkv, S]`` or ``[B, 1, S]``, float32 or float64, finite.

        Raises:
            ScoreError: If ``score`` returned another shape, type or device, or NaN for a column that counts.
        """
        return check_scores(self.score(view), view, strata, self.name)


def onward_decision(view: View, kept: Tensor, *, crop_here: bool = True) -> Decision:
    """Return the decision that later layers receive only ``kept`` columns.

    Args:
        view: The view that the policy decides about.
        kept: bool ``[B, 1, S]``.
        crop_here: Whether the deciding layer's own cache is pruned, too: to the kept columns that decoding
            sees.
    """
    onward = Selection.from_mask(kept)
    if not crop_here:
        return Decision(onward=onward)
    decode = view.visible[:, None]  # [B, 1, S]
    here = kept & (decode | ~decode.any(-1, keepdim=True))  # samples without an image keep what is kept
    return Decision(cache=Selection.from_mask(here), onward=onward)
