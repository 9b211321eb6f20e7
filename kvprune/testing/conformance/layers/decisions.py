"""What a policy answers about one layer: shape, budget, visibility, monotony.

Nothing here trusts the core's own checks: a selection may have been made without them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch

from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.budgeted import ScoringPolicy
from kvprune.policy.moments import FeaturePolicy
from kvprune.policy.view import FeatureView, LayerView
from kvprune.testing.conformance.common.budgets import allowance, keeping_all, widening
from kvprune.testing.conformance.common.findings import Violation
from kvprune.testing.problems import LayerProblem
from kvprune.testing.reference import (
    existing,
    kept_sets,
    live_rows,
    seen_by_row,
    slow_decode,
    slow_groups,
    slow_prefill,
    slow_strata,
)
from kvprune.tokens.decision import Decision
from kvprune.tokens.selection import Selection
from kvprune.tokens.visibility import Visibility

__all__ = [
    "answer",
    "check_budget",
    "check_groups",
    "check_keeps_all",
    "check_monotone",
    "check_rows",
    "check_shape",
    "check_visible",
    "decides_nothing",
    "pose",
    "require_sum",
    "require_well_formed",
    "wanted_of",
]

Sees = Callable[[Visibility, int], set[int]]


def pose(policy: CrossKVPolicy, problem: LayerProblem) -> FeatureView | LayerView:
    """Return the view of a problem, with what the policy declared that it needs and no more."""
    by_features = isinstance(policy, FeaturePolicy)  # which is shown features in any case
    view = problem.features(policy.name) if by_features else problem.view(policy.name)
    given = policy.needs | {"features"} if by_features else policy.needs
    return dataclasses.replace(view, captured=view.captured.only(given))


def answer(policy: CrossKVPolicy, view: FeatureView | LayerView) -> Decision:
    """Return the policy's decision, or raise because it is malformed (KV01)."""
    with torch.no_grad():
        if isinstance(view, FeatureView):
            assert isinstance(policy, FeaturePolicy)
            decision = policy.choose(view)
        else:
            decision = policy.select(view)
    require_well_formed(decision, view)
    return decision


def require_well_formed(decision: object, view: FeatureView | LayerView) -> None:
    """Raise unless a decision has the shape and order that KV01 asks for."""
    if not isinstance(decision, Decision):
        raise Violation("a Decision(cache=..., onward=...) from select (KV01)", repr(decision)[:200])
    batch, heads, columns = view.batch, view.heads, view.columns
    for part, selection in (("cache", decision.cache), ("onward", decision.onward)):
        if selection is not None:
            _well_formed(part, selection, batch, (1, heads) if part == "cache" else (1,), columns)


def _well_formed(part: str, selection: Selection, batch: int, heads: tuple[int, ...], columns: int) -> None:
    """KV01, entry by entry. That a row keeps anything at all is KV03."""
    if not isinstance(selection, Selection):
        raise Violation(f"a Selection or None as {part} (KV01)", type(selection).__name__)
    indices, valid = selection.indices, selection.valid
    for name, tensor, dtype in (("indices", indices, torch.int64), ("valid", valid, torch.bool)):
        wanted = f"{part}.{name} of {dtype} [{batch}, {' or '.join(map(str, heads))}, K] (KV01)"
        if not isinstance(tensor, torch.Tensor):
            raise Violation(wanted, type(tensor).__name__)
        shape = list(tensor.shape)
        if tensor.dtype != dtype or len(shape) != 3 or shape[0] != batch or shape[1] not in heads:
            raise Violation(wanted, f"{tensor.dtype} {shape}")
    if indices.shape != valid.shape:
        raise Violation(
            f"{part}.valid of the shape of indices, {list(indices.shape)} (KV01)", str(list(valid.shape))
        )
    if selection.columns != columns:
        raise Violation(
            f"{part} to select out of the {columns} columns of the view (KV01)", f"{selection.columns}"
        )
    for sample, by_head in enumerate(indices.tolist()):
        for head, row in enumerate(by_head):
            count = sum(flags := valid[sample, head].tolist())
            where = f"{part}, sample {sample}, head {head}: "
            if not all(0 <= index < columns for index in row):
                raise Violation(f"{where}columns in [0, {columns}) (KV01)", f"{row}")
            if flags != sorted(flags, reverse=True):
                raise Violation(f"{where}valid entries before padding (KV01)", f"valid {flags}")
            if row[:count] != sorted(set(row[:count])):
                raise Violation(f"{where}strictly increasing columns (KV01)", f"{row[:count]}")
            if count and any(index != row[count - 1] for index in row[count:]):
                raise Violation(f"{where}padding that repeats the last column (KV01)", f"{row}")


def _rows(
    policy: CrossKVPolicy, problem: LayerProblem
) -> Iterator[tuple[str, Visibility, int, int, set[int], Sees]]:
    """Yield each row of the policy's selections, and what should be kept of it: decode or prefill columns."""
    view = pose(policy, problem)
    decision = answer(policy, view)
    parts: tuple[tuple[str, Selection | None, Sees], ...] = (
        ("cache", decision.cache, slow_decode),
        ("onward", decision.onward, slow_prefill),
    )
    for part, selection, sees in parts:
        if selection is not None:
            for sample, heads in enumerate(kept_sets(selection)):
                for head, kept in enumerate(heads):
                    yield part, view.visibility, sample, head, kept, sees


def check_shape(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV01: the answer is well formed."""
    answer(policy, pose(policy, problem))


def check_budget(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV02: decoding sees exactly the budget, by sample and head, and later layers by stratum, too.

    Where the policy says that its budget is one of the layer, heads share it. A policy with a budget of the
    model is asked about its only layer here, and `layers.check_budget_of_layers` asks about several.
    """
    view = pose(policy, problem)
    decision = answer(policy, view)
    whole = policy.exact_budget is None  # then a layer that comes before the decision keeps everything
    if decision == Decision() and (problem.rank > 0 or whole) and _decides_onward(policy, problem):
        return  # another layer decides for this one
    see, batch = view.visibility, view.visibility.batch
    strata = [slow_strata(see, sample) for sample in range(batch)]
    cached = [[strata[sample][0]] for sample in range(batch)]  # what decoding sees if nothing is decided
    if decision.cache is not None:
        cached = kept_sets(decision.cache)
    elif decision.onward is not None and not isinstance(policy, ScoringPolicy):
        cached = [[] for _ in range(batch)]  # it decides for later layers and leaves its own whole
    for sample in range(batch):
        if not slow_prefill(see, sample) and live_rows(see, sample):
            continue  # a turn that brought this sample no image: what is kept here is a placeholder
        passed = (
            []
            if decision.onward is None
            else [("onward", kept_sets(decision.onward)[sample], strata[sample])]
        )
        for part, by_head, counted in (("cache", cached[sample], strata[sample][:1]), *passed):
            for stratum in filter(None, counted):
                wanted = wanted_of(policy, see, sample, stratum)
                kept = [head & stratum for head in by_head]
                where = f"{part}, sample {sample}"
                if policy.budget_scope == "layer":
                    require_sum(f"{where}, {len(kept)} heads together", policy, kept, wanted, stratum)
                    continue
                for head, tokens in enumerate(kept):
                    require_sum(f"{where}, head {head}", policy, [tokens], wanted, stratum)


def wanted_of(policy: CrossKVPolicy, see: Visibility, sample: int, stratum: set[int]) -> int:
    """How many tokens of a stratum the policy's budget keeps in one head, one of each group at least."""
    groups = sum(bool(group & stratum) for group in slow_groups(see, sample))
    return max(allowance(policy, len(stratum)), groups)


def require_sum(
    where: str, policy: CrossKVPolicy, kept: list[set[int]], wanted: int, visible: set[int]
) -> None:
    """Raise unless heads keep ``wanted`` tokens each, counted together."""
    if sum(map(len, kept)) != wanted * len(kept):
        of = f"{len(kept)} x {len(visible)}" if len(kept) > 1 else f"{len(visible)}"
        raise Violation(
            f"{where} to keep {wanted * len(kept)} of {of} visible tokens at {policy.spec}",
            f"{sum(map(len, kept))}: {'; '.join(str(sorted(tokens)) for tokens in kept)}",
        )


def _decides_onward(policy: CrossKVPolicy, problem: LayerProblem) -> bool:
    """Whether some layer decides what later ones receive; the first one, if the budget is exact."""
    ranks = range(problem.num_layers if policy.exact_budget is None else 1)
    layers = (dataclasses.replace(problem, rank=rank, received=1.0) for rank in ranks)
    return any(answer(policy, pose(policy, layer)).onward is not None for layer in layers)


def check_groups(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV03: each sample keeps a token, and so does each visibility group."""
    for part, see, sample, head, kept, sees in _rows(policy, problem):
        where = f"{part}, sample {sample}, head {head}"
        if not kept:
            raise Violation(f"{where} to keep a token at least", "none kept")
        for group in slow_groups(see, sample):
            if (group := group & sees(see, sample)) and not group & kept:
                raise Violation(
                    f"{where} to keep a token of each visibility group",
                    f"none of {sorted(group)}: {sorted(kept)}",
                )


def check_visible(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV04: nothing unseen is kept while something visible is dropped."""
    for part, see, sample, head, kept, sees in _rows(policy, problem):
        visible = sees(see, sample)
        if not visible and not live_rows(see, sample):
            visible = existing(see, sample)  # a sample without an image attends to everything there is
        if (unseen := kept - visible) and (dropped := visible - kept):
            raise Violation(
                f"{part}, sample {sample}, head {head} to drop unseen columns before visible ones",
                f"columns {sorted(unseen)} kept that no row sees, {sorted(dropped)} dropped that are visible",
            )


def check_rows(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV05: a row that saw a token still sees one; decoding is the last row."""
    for part, see, sample, head, kept, _ in _rows(policy, problem):
        rows = live_rows(see, sample)
        for row in rows[-1:] if part == "cache" else rows:
            if (seen := seen_by_row(see, sample, row)) and not seen & kept:
                raise Violation(
                    f"{part}, sample {sample}, head {head} to leave text row {row} one of the columns "
                    f"that it saw, {sorted(seen)}",
                    f"kept {sorted(kept)}",
                )


def check_keeps_all(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV07, KV08: at the budget 1, no visible token goes (and no column, where all are visible)."""
    unlimited = keeping_all(policy) or policy
    for part, see, sample, head, kept, sees in _rows(unlimited, problem):
        if dropped := sees(see, sample) - kept:
            raise Violation(
                f"{part}, sample {sample}, head {head} to keep all visible tokens at {unlimited.spec}",
                f"columns {sorted(dropped)} dropped",
            )


def check_monotone(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV14: a larger budget keeps a superset."""
    before: dict[str, list[list[set[int]]]] = {}
    smaller = ""
    for larger in widening(policy):
        decision = answer(larger, pose(larger, problem))
        for part, selection in (("cache", decision.cache), ("onward", decision.onward)):
            if selection is None:
                before.pop(part, None)
                continue
            now = kept_sets(selection)
            heads = max(len(now[0]), len(before.get(part, now)[0]))
            for sample, by_head in enumerate(now):
                for head in range(heads):
                    less = before.get(part, now)[sample]
                    lost = less[min(head, len(less) - 1)] - by_head[min(head, len(by_head) - 1)]
                    if lost:
                        raise Violation(
                            f"{part}, sample {sample}, head {head} to keep at {larger.spec} all that it "
                            f"keeps at {smaller}",
                            f"columns {sorted(lost)} dropped by the larger budget",
                        )
            before[part] = now
        smaller = str(larger.spec)


def decides_nothing(policy: CrossKVPolicy, problem: LayerProblem) -> bool:
    """Whether the policy leaves everything as it is, here."""
    return answer(policy, pose(policy, problem)) == Decision()
