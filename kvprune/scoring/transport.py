"""Entropic optimal transport by Sinkhorn iterations, in blocks, so that no matrix of all costs is held."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["sinkhorn_given"]


def sinkhorn_given(
    costs: Callable[[], Iterator[tuple[slice, Tensor]]],
    sources: Tensor | None,
    targets: Tensor,
    epsilon: float,
    steps: int,
) -> Tensor:
    """Return what each source gives in a transport plan after some Sinkhorn iterations, ``[n]``.

    The plan is ``exp(u_i - cost_ij / epsilon + v_j)``. Each iteration first sets u so that each source gives
    its mass, then v so that each target receives its mass. At the end the targets' masses hold exactly, and
    those of the sources only nearly. With many iterations, what a source gives goes to its mass.

    Args:
        costs: Called once more than there are iterations. Yields slices of targets and the costs of moving
            mass from each source to them, ``[n, m]``, which may be written to. A cost may be infinite, but
            not all costs of a source or of a target.
        sources: The mass of each source, ``[n]``, not negative; a mass of 0 counts as 1e-30. None leaves u at
            0: each source gives what the targets draw from it, whatever the number of iterations.
        targets: The mass of each target, likewise; both add up to the same.
        epsilon: Temperature; if it is small, each target draws from its cheapest sources only.
        steps: Number of iterations, at least 1.

    Example:
        Source 0 is nearer to target 0, and source 1 to target 1.

        >>> def costs():
        ...     yield slice(0, 2), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> half, most = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
        >>> sinkhorn_given(costs, None, half, epsilon=1.0, steps=1)
        tensor([0.5000, 0.5000])
        >>> sinkhorn_given(costs, most, half, epsilon=1.0, steps=1)
        tensor([0.8644, 0.1356])
        >>> sinkhorn_given(costs, most, half, epsilon=1.0, steps=50)
        tensor([0.9000, 0.1000])
    """
    log_targets = _log(targets)
    if sources is None:
        return _drawn(costs, torch.zeros_like(log_targets), log_targets, epsilon).exp()
    log_sources = _log(sources)
    u = torch.full_like(log_sources, -torch.inf)
    for _, cost in costs():
        u = torch.logaddexp(u, cost.mul_(-1 / epsilon).logsumexp(1))
    u = log_sources - u
    for _ in range(steps - 1):
        u = u + log_sources - _drawn(costs, u, log_targets, epsilon)
    return _drawn(costs, u, log_targets, epsilon).exp()


def _log(masses: Tensor) -> Tensor:
    return masses.clamp(min=1e-30).log()


def _drawn(
    costs: Callable[[], Iterator[tuple[slice, Tensor]]], u: Tensor, log_targets: Tensor, epsilon: float
) -> Tensor:
    """Set v so that each target receives its mass; return the log of what each source gives then, ``[n]``."""
    drawn = torch.full_like(u, -torch.inf)
    for columns, cost in costs():
        logits = cost.mul_(-1 / epsilon).add_(u[:, None])  # [n, m]
        logits.add_(log_targets[columns] - logits.logsumexp(0))
        drawn = torch.logaddexp(drawn, logits.logsumexp(1))
    return drawn
