"""Calls the policy: builds the views it reads, calls its methods, and names it in the errors it raises.

`CrossKVManager` calls this once at each moment at which a policy decides: `choose` before the first layer,
`select_text` after a self-attention layer, `select` or `observe` after a cross-attention layer, and
`conclude` after the last one. A new moment adds one method that builds its view and one that calls the
policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.engine.prefill import ObservedLayer, Prefill
from kvprune.engine.read_only import unchanged
from kvprune.errors import KVPruneError, PolicyFailedError, SelectionError
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.captured import Captured
from kvprune.policy.held_weights import HeldWeights
from kvprune.policy.moments import FeaturePolicy, PrefillPolicy
from kvprune.policy.text_view import TextView
from kvprune.policy.view import FeatureView, LayerView
from kvprune.tokens.decision import Decision
from kvprune.tokens.selection import Selection

__all__ = ["PolicyCalls"]

_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class PolicyCalls:
    """Calls one policy on one model.

    Args:
        policy: The policy.
        seed: Seed for policies that draw random numbers.
        layer_indices: The model's cross-attention layers in order.
        on_draw: Called when the policy draws random numbers.
        held: The weights of the policy.
    """

    policy: CrossKVPolicy
    seed: int
    layer_indices: tuple[int, ...]
    on_draw: Callable[[], None] = lambda: None
    held: HeldWeights = field(default_factory=HeldWeights)

    def feature_view(self, prefill: Prefill, features: Tensor) -> FeatureView:
        """Return the view of a policy that decides before the first layer.

        Args:
            prefill: The current prefill.
            features: ``[R, S, C]``, all new columns.
        """
        return FeatureView(
            visibility=prefill.arriving(None),
            num_layers=len(self.layer_indices),
            seed=self.seed,
            fingerprints=self._noting(prefill.fingerprints),
            policy_name=self.policy.name,
            on_draw=self.on_draw,
            held=self.held,
            layout_of=prefill.layout,
            captured=Captured(features=features).joined(prefill.captured, features.device),
        )

    def layer_view(
        self,
        prefill: Prefill,
        rank: int,
        layer: CrossKVLayer,
        received: Selection | None,
        captured: Captured,
        *,
        scaling: float,
        follows_text: bool,
    ) -> LayerView:
        """Return the view of a layer that has just attended.

        Args:
            prefill: The current prefill.
            rank: Index among the cross-attention layers.
            layer: Its cache layer, updated.
            received: The columns that arrived at the layer; None for all new ones.
            captured: Captured in this layer, for each row of the batch.
            scaling: Factor on attention logits.
            follows_text: Whether a self-attention layer comes before this layer.
        """
        arriving = prefill.arriving(received)
        new = layer.own - arriving.columns  # new entries come last; quantized ones belong to earlier images
        own = captured.rows(slice(None, None, layer.copies))
        return LayerView(
            keys=layer.keys[..., new:, :],  # [R, Hkv, S, D]
            values=layer.values[..., new:, :],  # [R, Hkv, S, D]
            visibility=arriving,
            layer_idx=self.layer_indices[rank],
            rank=rank,
            num_layers=len(self.layer_indices),
            scaling=scaling,
            seed=self.seed,
            fingerprints=self._noting(prefill.fingerprints),
            policy_name=self.policy.name,
            on_draw=self.on_draw,
            held=self.held,
            layout_of=prefill.layout_of(received),
            captured=prefill.captured_of(rank, received, own, layer.keys.device, follows_text),
            follows_text=follows_text,
        )

    def choose(self, policy: FeaturePolicy, view: FeatureView) -> object:
        """Ask for the decision before the first layer."""
        return self._call(view, lambda: policy.choose(view))

    def select(self, view: LayerView) -> object:
        """Ask for the decision about a cross-attention layer that has attended."""
        return self._call(view, lambda: self.policy.select(view))

    def select_text(self, view: TextView) -> Selection | None:
        """Ask for the decision about the text cache of a self-attention layer that has attended."""
        return self._call(view, lambda: self.policy.select_text(view))

    def observe(self, policy: PrefillPolicy, view: LayerView) -> object:
        """Return the statistics that a `PrefillPolicy` keeps of one layer until it decides."""
        return self._call(view, lambda: policy.observe(view))

    def conclude(self, policy: PrefillPolicy, observed: Sequence[ObservedLayer]) -> list[Decision]:
        """Ask for the decisions about all layers, after the last one has attended.

        Raises:
            SelectionError: If there is not one decision for each layer, or if one prunes what later layers
                receive.
        """
        views = [layer.context.view for layer in observed]
        statistics = [layer.statistics for layer in observed]
        decisions = self._call(views[-1], lambda: list(policy.conclude(views, statistics)), views)
        if len(decisions) != len(views):
            raise SelectionError(
                f"policy {policy.name!r}: conclude returned {len(decisions)} decisions, "
                f"expected one for each of {len(views)} layers"
            )
        for view, decision in zip(views, decisions, strict=True):
            if isinstance(decision, Decision) and decision.onward is not None:
                raise SelectionError(
                    f"policy {policy.name!r} {view.where}: conclude decided what later layers "
                    "receive, but all of them have attended; return Decision(cache=...)"
                )
        return decisions

    def _noting(self, fingerprints: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return the function, which now counts as a draw: a sample's random numbers start from them."""

        def noted() -> Tensor:
            self.on_draw()
            return fingerprints()

        return noted

    def _call(
        self,
        view: FeatureView | LayerView | TextView,
        question: Callable[[], _Answer],
        views: Sequence[object] = (),
    ) -> _Answer:
        """Call the policy, and turn an unexpected exception into an error that names the policy.

        Args:
            view: Where the policy is asked, for messages.
            question: The call.
            views: What it reads; ``view`` if empty.
        """
        try:
            with unchanged(self.policy.name, view.where, views or (view,)):
                return question()
        except (KVPruneError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise PolicyFailedError(
                f"policy {self.policy.name!r} raised {type(error).__name__} {view.where}: {str(error)[:500]}"
            ) from error
