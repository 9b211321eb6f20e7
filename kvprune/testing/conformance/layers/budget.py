"""How many tokens a policy keeps in one layer: the exact budget, all of them, more for a larger budget.

KV02, KV07, KV08 and KV14.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from fractions import Fraction

from kvprune.policy.allocators import LayerAllocator
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.budgeted import ScoringPolicy
from kvprune.testing.conformance.common.budgets import allowance, keeping_all, widening
from kvprune.testing.conformance.common.results import Violation
from kvprune.testing.conformance.layers.answers import answer, kept_rows, pose, selections_of
from kvprune.testing.problems import LayerProblem
from kvprune.testing.reference import kept_sets, live_rows, slow_groups, slow_prefill, slow_strata
from kvprune.tokens.decision import Decision
from kvprune.tokens.visibility import Visibility

__all__ = [
    "check_budget",
    "check_keeps_all",
    "check_monotone",
    "lost_columns",
    "received_no_image",
    "require_layer_sum",
    "require_model_sum",
    "wanted_of",
]

Heads = list[set[int]]
"""Kept columns of one sample, by head."""


def check_budget(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV02: decoding sees exactly the budget, by sample and head; later layers receive it in each stratum.

    If the policy declares that its budget is one of the layer, heads share it. A policy with a budget of the
    model is asked about its only layer here, and about several by `prefill_policies.check_budget_of_layers`.
    """
    view = pose(policy, problem)
    decision = answer(policy, view)
    if _is_decided_elsewhere(policy, problem, decision):
        return
    see = view.visibility
    for sample in range(see.batch):
        if received_no_image(see, sample):
            continue
        strata = slow_strata(see, sample)
        for part, heads, counted in _counted(policy, decision, sample, strata):
            for stratum in filter(None, counted):
                wanted = wanted_of(policy, see, sample, stratum)
                kept = [head & stratum for head in heads]
                require_layer_sum(f"{part}, sample {sample}", policy, kept, wanted, stratum)


def _is_decided_elsewhere(policy: CrossKVPolicy, problem: LayerProblem, decision: Decision) -> bool:
    """Return whether a policy that decides nothing about this layer decides about it in another layer.

    That is an earlier layer. A policy without an exact budget may also keep everything in the layers before
    the one that decides.
    """
    if decision != Decision() or (problem.rank == 0 and policy.exact_budget is not None):
        return False
    ranks = range(problem.num_layers if policy.exact_budget is None else 1)
    layers = (dataclasses.replace(problem, rank=rank, received=1.0) for rank in ranks)
    return any(answer(policy, pose(policy, layer)).onward is not None for layer in layers)


def _counted(
    policy: CrossKVPolicy, decision: Decision, sample: int, strata: list[set[int]]
) -> Iterator[tuple[str, Heads, list[set[int]]]]:
    """Yield what one sample keeps by part, and the strata in which its tokens are counted."""
    if decision.cache is not None:
        yield "cache", kept_sets(decision.cache)[sample], strata[:1]
    elif decision.onward is None or isinstance(policy, ScoringPolicy):
        yield "cache", [strata[0]], strata[:1]  # nothing is decided: decoding sees all that is visible
    # Otherwise the layer that decides for later ones keeps its own cache whole.
    if decision.received is not None:
        yield "onward", kept_sets(decision.received)[sample], strata


def received_no_image(see: Visibility, sample: int) -> bool:
    """Return whether this turn brought a sample no image; its tokens are placeholders then."""
    return not slow_prefill(see, sample) and bool(live_rows(see, sample))


def wanted_of(policy: CrossKVPolicy, see: Visibility, sample: int, stratum: set[int]) -> int:
    """Return how many tokens of a stratum the budget keeps in one head, at least one of each group."""
    groups = sum(bool(group & stratum) for group in slow_groups(see, sample))
    return max(allowance(policy, len(stratum)), groups)


def require_layer_sum(
    where: str, policy: CrossKVPolicy, heads: Heads, wanted: int, visible: set[int]
) -> None:
    """Raise unless the heads of one layer keep ``wanted`` tokens each, or on average (`budget_scope`).

    Args:
        where: Names layer and sample in the message.
        policy: States the budget and its scope.
        heads: Kept columns of one sample, visible ones only.
        wanted: Tokens for each head.
        visible: The columns that the budget counts.
    """
    # An allocator shares among layers only. Another policy's layer counts with the mean of its heads.
    among_heads = policy.budget_scope == "model" and not isinstance(policy, LayerAllocator)
    if policy.budget_scope == "layer" or among_heads:
        _require_sum(f"{where}, {len(heads)} heads together", policy, heads, wanted, visible)
        return
    for head, tokens in enumerate(heads):
        _require_sum(f"{where}, head {head}", policy, [tokens], wanted, visible)


def _require_sum(where: str, policy: CrossKVPolicy, heads: Heads, wanted: int, visible: set[int]) -> None:
    got = sum(map(len, heads))
    if got != wanted * len(heads):
        of = f"{len(heads)} x {len(visible)}" if len(heads) > 1 else f"{len(visible)}"
        raise Violation(
            f"{where} to keep {wanted * len(heads)} of {of} visible tokens at {policy.spec}",
            f"{got}: {'; '.join(str(sorted(tokens)) for tokens in heads)}",
        )


def require_model_sum(
    where: str, policy: CrossKVPolicy, layers: Sequence[Heads], wanted: int, visible: set[int]
) -> None:
    """Raise unless layers together keep ``wanted`` tokens each; a layer counts with the mean of its heads.

    Args:
        where: Names the sample in the message.
        policy: States the budget.
        layers: Kept columns of one sample by layer and head, visible ones only.
        wanted: Tokens for each layer.
        visible: The columns that the budget counts.
    """
    total = sum(Fraction(sum(map(len, heads)), len(heads)) for heads in layers)
    if total != wanted * len(layers):
        raise Violation(
            f"{where}, {len(layers)} layers together to keep {wanted * len(layers)} of "
            f"{len(layers)} x {len(visible)} visible tokens (mean over heads) at {policy.spec}",
            f"{float(total):g}: "
            f"{'; '.join(', '.join(str(sorted(kept)) for kept in heads) for heads in layers)}",
        )


def check_keeps_all(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV07, KV08: at the budget 1, no visible token is dropped."""
    unlimited = keeping_all(policy) or policy
    for row in kept_rows(unlimited, problem):
        if dropped := row.visible - row.kept:
            raise Violation(
                f"{row.where} to keep all visible tokens at {unlimited.spec}",
                f"columns {sorted(dropped)} dropped",
            )


def check_monotone(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV14: a larger budget keeps a superset."""
    before: dict[str, list[Heads]] = {}  # by part
    smaller = ""
    for larger in widening(policy):
        decision = answer(larger, pose(larger, problem))
        now = {part: kept_sets(selection) for part, selection in selections_of(decision)}
        for part, samples in now.items():
            for sample, heads in enumerate(samples):
                less = before.get(part, samples)[sample]
                for head, lost in lost_columns(less, heads):
                    raise Violation(
                        f"{part}, sample {sample}, head {head} to keep at {larger.spec} all that it keeps at "
                        f"{smaller}",
                        f"columns {sorted(lost)} dropped by the larger budget",
                    )
        before, smaller = now, str(larger.spec)


def lost_columns(smaller: Heads, larger: Heads) -> Iterator[tuple[int, set[int]]]:
    """Yield each head in which the larger budget drops columns that the smaller one keeps, with these.

    One row for all heads counts for each head.
    """
    for head in range(max(len(smaller), len(larger))):
        lost = smaller[min(head, len(smaller) - 1)] - larger[min(head, len(larger) - 1)]
        if lost:
            yield head, lost
