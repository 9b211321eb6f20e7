"""Binds a guide to the model and the policy that it guides."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from kvprune.adapters.base import ModelAdapter
from kvprune.engine.guidance import Guidance, Prompt
from kvprune.errors import GuideError
from kvprune.policy.base import CrossKVPolicy
from kvprune.session.answer_guide import AnswerGuide, require_matching_guide
from kvprune.session.guide import BoundGuide, Guide
from kvprune.session.reconstruction import BoundReconstruction

__all__ = ["bound_guide"]


def bound_guide(
    guide: nn.Module | Guide | Guidance | AnswerGuide | BoundReconstruction | None,
    target: ModelAdapter,
    policy: CrossKVPolicy,
) -> Callable[[Prompt], Guidance] | None:
    """Return the function that provides guidance; None if the policy does not use a guide.

    Raises:
        GuideError: If a guide is given and the policy does not use one, or the guide knows the answer and the
            policy must not, or the other way round.
    """
    if "reconstruction" in policy.needs and (guide is None or isinstance(guide, BoundReconstruction)):
        return guide or BoundReconstruction(target, policy)
    if "guidance" not in policy.needs or "reconstruction" in policy.needs:
        if guide is not None:
            raise GuideError(
                f"policy {policy.spec} does not use a guide, but got one ({type(guide).__name__}); leave "
                'guide out, or choose a policy that needs "guidance", such as guided'
            )
        return None
    require_matching_guide(policy, guide)
    if isinstance(guide, Guidance):
        return lambda prompt: guide
    if isinstance(guide, AnswerGuide | BoundReconstruction):
        return guide
    return BoundGuide(guide if isinstance(guide, Guide) else Guide(guide), target)
