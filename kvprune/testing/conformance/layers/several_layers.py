"""What a policy that decides after prefill answers about several layers at once.

The other checks on views ask it about one layer, as if the model had no other. Policies that decide about
each layer on its own pass here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction

import torch

from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.moments import PrefillPolicy
from kvprune.policy.view import LayerView
from kvprune.testing.conformance.common.budgets import widening
from kvprune.testing.conformance.common.findings import Violation
from kvprune.testing.conformance.layers.decisions import (
    pose,
    require_sum,
    require_well_formed,
    wanted_of,
)
from kvprune.testing.cutting import cut_to_sample
from kvprune.testing.problems import LayerProblem
from kvprune.testing.reference import (
    kept_sets,
    live_rows,
    same_by_head,
    slow_decode,
    slow_prefill,
    slow_strata,
)
from kvprune.tokens.decision import Decision

__all__ = ["check_alone_in_layers", "check_budget_of_layers", "check_monotone_in_layers"]

Kept = list[list[list[set[int]]]]
"""Kept columns by layer, sample and head."""


def check_budget_of_layers(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV02: layers keep exactly the budget, together or each, as the policy's budget_scope says."""
    if not isinstance(policy, PrefillPolicy):
        return
    layers = _kept(policy, _views(policy, problem))
    see = pose(policy, problem).visibility
    for sample in range(see.batch):
        if not slow_prefill(see, sample) and live_rows(see, sample):
            continue  # a turn that brought this sample no image: what is kept here is a placeholder
        visible = slow_strata(see, sample)[0]
        if not visible:
            continue
        wanted = wanted_of(policy, see, sample, visible)
        kept = [[head & visible for head in layer[sample]] for layer in layers]
        if policy.budget_scope == "model":
            total = sum(Fraction(sum(map(len, heads)), len(heads)) for heads in kept)
            if total != wanted * len(kept):
                raise Violation(
                    f"sample {sample}, {len(kept)} layers together to keep {wanted * len(kept)} of "
                    f"{len(kept)} x {len(visible)} visible tokens (mean over heads) at {policy.spec}",
                    f"{float(total):g}: {'; '.join(_listed(heads) for heads in kept)}",
                )
            continue
        for rank, heads in enumerate(kept):
            parts = [heads] if policy.budget_scope == "layer" else [[head] for head in heads]
            for part in parts:
                require_sum(f"sample {sample}, rank {rank}", policy, part, wanted, visible)


def check_monotone_in_layers(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV14: a larger budget takes nothing from any layer."""
    if not isinstance(policy, PrefillPolicy):
        return
    before: Kept | None = None
    smaller = ""
    for larger in widening(policy):
        assert isinstance(larger, PrefillPolicy)
        now = _kept(larger, _views(larger, problem))
        for rank, layer in enumerate(now):
            for sample, heads in enumerate(layer):
                less = heads if before is None else before[rank][sample]
                for head in range(max(len(heads), len(less))):
                    lost = less[min(head, len(less) - 1)] - heads[min(head, len(heads) - 1)]
                    if lost:
                        raise Violation(
                            f"rank {rank}, sample {sample}, head {head} to keep at {larger.spec} all that "
                            f"it keeps at {smaller}, where {len(now)} layers share a budget",
                            f"columns {sorted(lost)} dropped by the larger budget",
                        )
        before, smaller = now, str(larger.spec)


def check_alone_in_layers(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV10: a sample keeps alone, in each of several layers, what it keeps in a batch."""
    if not isinstance(policy, PrefillPolicy):
        return
    together = _kept(policy, _views(policy, problem))
    for sample in range(len(problem.layouts)):

        def cut(view: LayerView, sample: int = sample) -> LayerView:
            return cut_to_sample(view, problem, sample)

        for rank, layer in enumerate(_kept(policy, _views(policy, problem, cut))):
            if not same_by_head(together[rank][sample], layer[0]):
                raise Violation(
                    f"rank {rank} to keep of sample {sample} alone what it keeps in the batch, "
                    f"{_listed(together[rank][sample])}",
                    _listed(layer[0]),
                )


def _views(
    policy: PrefillPolicy, problem: LayerProblem, change: Callable[[LayerView], LayerView] | None = None
) -> list[LayerView]:
    """The views of all layers of a problem, in order."""
    views = []
    for rank in range(problem.num_layers):
        view = pose(policy, dataclasses.replace(problem, rank=rank))
        assert isinstance(view, LayerView)
        views.append(view if change is None else change(view))
    return views


def _kept(policy: PrefillPolicy, views: list[LayerView]) -> Kept:
    """What a policy keeps of each layer, asked as the cache manager asks it."""
    with torch.no_grad():
        observed = [policy.observe(view) for view in views]
        bare = [view.without_captured() for view in views]
        decisions = list(policy.conclude(bare, observed))
    if len(decisions) != len(views):
        raise Violation(f"a decision for each of {len(views)} layers from conclude", f"{len(decisions)}")
    return [_cached(decision, view) for decision, view in zip(decisions, views, strict=True)]


def _cached(decision: Decision, view: LayerView) -> list[list[set[int]]]:
    require_well_formed(decision, view)
    if decision.cache is not None:
        return kept_sets(decision.cache)
    return [[slow_decode(view.visibility, sample)] for sample in range(view.batch)]


def _listed(by_head: list[set[int]]) -> str:
    return ", ".join(str(sorted(kept)) for kept in by_head)
