"""Asks policies that decide after prefill about all layers of a model at once: KV02, KV10 and KV14.

The other checks on views ask about one layer, as if the model had no other. Policies that decide about each
layer on its own pass here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.moments import PrefillPolicy
from kvprune.policy.view import LayerView
from kvprune.testing.conformance.common.budgets import widening
from kvprune.testing.conformance.common.results import Violation
from kvprune.testing.conformance.layers.answers import pose, require_well_formed
from kvprune.testing.conformance.layers.budget import (
    lost_columns,
    received_no_image,
    require_layer_sum,
    require_model_sum,
    wanted_of,
)
from kvprune.testing.cutting import cut_to_sample
from kvprune.testing.problems import LayerProblem
from kvprune.testing.reference import kept_sets, same_by_head, slow_decode, slow_strata
from kvprune.tokens.decision import Decision

__all__ = ["check_alone_in_layers", "check_budget_of_layers", "check_monotone_in_layers"]

Kept = list[list[list[set[int]]]]
"""Kept columns by layer, sample and head."""


def check_budget_of_layers(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV02: layers keep exactly the budget, together or each, as the policy's `budget_scope` says."""
    if not isinstance(policy, PrefillPolicy):
        return
    layers = _kept(policy, _views(policy, problem))
    see = pose(policy, problem).visibility
    for sample in range(see.batch):
        if received_no_image(see, sample):
            continue
        visible = slow_strata(see, sample)[0]
        if not visible:
            continue
        wanted = wanted_of(policy, see, sample, visible)
        kept = [[head & visible for head in layer[sample]] for layer in layers]
        if policy.budget_scope == "model":
            require_model_sum(f"sample {sample}", policy, kept, wanted, visible)
            continue
        for rank, heads in enumerate(kept):
            require_layer_sum(f"sample {sample}, rank {rank}", policy, heads, wanted, visible)


def check_monotone_in_layers(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV14: a larger budget keeps, in each layer, all that a smaller one keeps."""
    if not isinstance(policy, PrefillPolicy):
        return
    before: Kept | None = None
    smaller = ""
    for larger in widening(policy):
        assert isinstance(larger, PrefillPolicy)
        now = _kept(larger, _views(larger, problem))
        for rank, samples in enumerate(now):
            for sample, heads in enumerate(samples):
                less = heads if before is None else before[rank][sample]
                for head, lost in lost_columns(less, heads):
                    raise Violation(
                        f"rank {rank}, sample {sample}, head {head} to keep at {larger.spec} all that it "
                        f"keeps at {smaller}, with a budget for {len(now)} layers",
                        f"columns {sorted(lost)} dropped by the larger budget",
                    )
        before, smaller = now, str(larger.spec)


def check_alone_in_layers(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV10: a sample keeps alone, in each layer, what it keeps in a batch."""
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
    """Return the views of all layers of a problem, in order, each changed if there is a change."""
    views = []
    for rank in range(problem.num_layers):
        view = pose(policy, dataclasses.replace(problem, rank=rank))
        assert isinstance(view, LayerView)
        views.append(view if change is None else change(view))
    return views


def _kept(policy: PrefillPolicy, views: list[LayerView]) -> Kept:
    """Return what a policy keeps in each layer, asked as the engine asks it."""
    with torch.no_grad():
        observed = [policy.observe(view) for view in views]
        decisions = list(policy.conclude([view.without_captured() for view in views], observed))
    if len(decisions) != len(views):
        raise Violation(f"a decision for each of {len(views)} layers from conclude", f"{len(decisions)}")
    return [_cached(decision, view) for decision, view in zip(decisions, views, strict=True)]


def _cached(decision: Decision, view: LayerView) -> list[list[set[int]]]:
    """Return what decoding reads, by sample and head."""
    require_well_formed(decision, view)
    if decision.cache is not None:
        return kept_sets(decision.cache)
    return [[slow_decode(view.visibility, sample)] for sample in range(view.batch)]


def _listed(by_head: list[set[int]]) -> str:
    return ", ".join(str(sorted(kept)) for kept in by_head)
