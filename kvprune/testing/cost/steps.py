"""One decode step at the dimensions of a large model: what a policy keeps for it, and what it reads in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvprune.cache.pools import gather_entries
from kvprune.policy.decode import DecodePolicy
from kvprune.policy.step_view import HeldView, StepView
from kvprune.policy.view import LayerView

__all__ = ["StepProblem", "take_step"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProblem:
    """What a `DecodePolicy` is asked about: one layer after prefill, and the token after the prompt.

    Attributes:
        layer: The layer after its attention in prefill. It keeps everything.
        queries: of the token, ``[1, Hq, D]``.
    """

    layer: LayerView
    queries: Tensor


def take_step(policy: DecodePolicy, problem: StepProblem) -> tuple[object, ...]:
    """Let a policy prepare and take the first step, and copy what the step reads, as the engine does.

    Args:
        policy: A policy that takes steps.
        problem: The layer and the token.

    Returns:
        All that is held at the end: the policy's state, before and after, and the entries that were read.
    """
    layer, queries = problem.layer, problem.queries
    columns = layer.keys.shape[-2]
    device = layer.keys.device
    slots = torch.arange(columns, device=device).expand(1, 1, -1)
    readable = torch.ones(1, 1, 1, dtype=torch.bool, device=device).expand(1, 1, columns)
    held = HeldView(
        layer=layer, keys=layer.keys, values=layer.values, slots=slots, valid=readable, columns=columns
    )
    state = policy.prepare(held)
    step = StepView(
        queries_of=lambda: queries,
        text_rows=1,
        keys=layer.keys,
        values=layer.values,
        slots_of=lambda: slots,
        readable_of=lambda: readable,
        number_of=lambda: torch.zeros((), dtype=torch.int64, device=device),
        taken=-1 if policy.compiles else 0,
        layer_idx=layer.layer_idx,
        rank=layer.rank,
        num_layers=layer.num_layers,
        scaling=layer.scaling,
        policy_name=policy.name,
        unrestricted=True,
        held=layer.held,
    )
    answer = policy.attend(step, state)
    read: tuple[Tensor, ...] = ()
    if answer is not None:
        read = tuple(gather_entries(side, answer.indices) for side in (step.keys, step.values))
    if not policy.observes:
        return state, read
    return state, read, policy.observe(step, _attention(queries, layer.keys, layer.scaling), state)


def _attention(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """What each entry receives, ``[1, Hq, K]``."""
    grouped = queries.view(1, keys.shape[1], -1, queries.shape[-1])
    logits = (grouped @ keys.mT).float() * scaling  # [1, Hkv, Hq / Hkv, K]
    return logits.softmax(-1).flatten(1, 2)
