"""Trained weights of a policy that runs on a model: whether they fit, and on which model they learned."""

from __future__ import annotations

from collections.abc import Iterator

from kvprune.adapters.base import ModelAdapter
from kvprune.adapters.sites import geometry_of
from kvprune.errors import WeightsError
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.held_weights import require_fit
from kvprune.policy.nesting import parts
from kvprune.policy.trained import TrainedPolicy
from kvprune.policy.weights import FRESH

__all__ = ["require_weights", "trained_parts", "weights_facts"]


def trained_parts(policy: CrossKVPolicy) -> Iterator[TrainedPolicy]:
    """Yield a policy and those among its options, as far as they have weights."""
    for part in parts(policy):
        if isinstance(part, TrainedPolicy) and (part.weights_path is not None or part.weights == FRESH):
            yield part


def require_weights(adapter: ModelAdapter, policy: CrossKVPolicy) -> None:
    """Raise unless the weights of a policy fit a model, as far as its modules tell.

    Raises:
        WeightsError: Says for which model they were trained, and how to train others.
    """
    for part in trained_parts(policy):
        require_fit(part, geometry_of(adapter.sites))


def weights_facts(policy: CrossKVPolicy) -> tuple[str, ...]:
    """Return a sentence about each of a policy's weights: which they are, and on which model they learned.

    Weights can fit a model that they were not trained on, and nothing but these sentences shows it.
    """
    return tuple(_fact(part) for part in trained_parts(policy))


def _fact(policy: TrainedPolicy) -> str:
    name = f"weights {policy.weights} of {policy.name}"
    if policy.weights_path is None:
        return f"{name}: untrained"
    try:
        file, shipped = policy.weights_file, policy.shipped
    except WeightsError:
        file, shipped = None, {}
    if file is None or file.digest != policy.digest:
        return f"{name} (digest {policy.digest}): their file is gone, or has changed"
    others = [
        f"weights={other}, trained on {its.trained_on}"
        for other, its in shipped.items()
        if its.trained_on != file.trained_on
    ]
    beside = f" ({policy.name} also comes with {'; '.join(others)})" if others else ""
    return f"{name} (digest {policy.digest}): trained on {file.trained_on}{beside}"
