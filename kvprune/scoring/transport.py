"""Entropic optimal transport by Sinkhorn iterations, in blocks, so that no matrix of all costs is held."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["sinkhorn_given"]


def sinkhorn_given(
    costs: Callable[[], Iterator[tuple[slice, Tensor]]],
    sources: Tensor,
    targets: Tensor,
    epsilon: float,
    steps: int,
) -> Tensor:
    """Return what each source gives in a transport plan after some Sinkhorn iterations, ``[n]``.

    The plan is ``exp(u_i - cost_ij / epsilon + v_j)``. A step sets v so that each target receives its mass;
    between two steps, u is set so that each source gives its mass. After the last step the targets' masses
    hold exactly, and those of the sources only nearly: the difference is the result. With many steps it goes
    to zero, and what a source gives goes to its own mass.

    Args:
        costs: Called once for each step; yields slices of targets and the costs of moving mass from each
            source to them, ``[n, m]``, which may be written to. A cost may be infinite, but not for all
            sources of a target.
        sources: The mass of each source, ``[n]``, not negative; a mass of 0 counts as 1e-30.
        targets: The mass of each target, likewise; both add up to the same.
        epsilon: Temperature; each target draws from its cheapest sources only if it is small.
        steps: Number of steps, at least 1.

    Example:
        Source 0 is nearer to target 0, and source 1 to target 1. One step ignores the sources' masses.

        >>> def costs():
        ...     yield slice(0, 2), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> half = torch.tensor([0.5, 0.5])
        >>> sinkhorn_given(costs, torch.tensor([0.9, 0.1]), half, epsilon=1.0, steps=1)
        tensor([0.5000, 0.5000])
        >>> sinkhorn_given(costs, torch.tensor([0.9, 0.1]), half, epsilon=1.0, steps=50)
        tensor([0.9000, 0.1000])
    """
    log_sources, log_targets = (masses.clamp(min=1e-30).log() for masses in (sources, targets))
    u = torch.zeros_like(log_sources)
    given = u
    for step in range(steps):
        if step:
            u = u + log_sources - given
        given = torch.full_like(u, -torch.inf)  # log of what each source gives
        for columns, cost in costs():
            logits = cost.mul_(-1 / epsilon).add_(u[:, None])  # [n, m]
            logits.add_(log_targets[columns] - logits.logsumexp(0))
            given = torch.logaddexp(given, logits.logsumexp(1))
    return given.exp()
