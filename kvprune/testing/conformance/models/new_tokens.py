"""Whether new tokens in the place of columns reach the layers of a tiny model (KV13)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.moments import FeatureScoringPolicy
from kvprune.policy.view import FeatureView
from kvprune.testing.conformance.models.decoding import check_oracle
from kvprune.testing.conformance.models.scenario import Scenario
from kvprune.tokens.decision import Decision
from kvprune.tokens.replacement import Replacement
from kvprune.tokens.selection import Selection

__all__ = ["check_new_tokens"]


@dataclass(frozen=True, kw_only=True)
class _Fainter(FeatureScoringPolicy):
    """Keeps half of the tokens, and puts three quarters of their features in their place."""

    name = "fainter"

    def score(self, view: FeatureView) -> Tensor:
        lengths: Tensor = view.features.float().norm(dim=-1)  # [B, S]
        return lengths[:, None]

    def choose(self, view: FeatureView) -> Decision:
        places = super().choose(view).onward
        assert isinstance(places, Selection)
        index = places.indices[:, 0, :, None].expand(-1, -1, view.features.shape[-1])  # [B, K, C]
        return Decision(onward=Replacement(view.features.gather(1, index) * 0.75, places))


def check_new_tokens(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """KV13: layers read new tokens as the untouched model does that is fed the same features."""
    check_oracle(_Fainter(), scenario)
