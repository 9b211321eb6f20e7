"""All invariants of policies on one page: which checks they have, and when they do not apply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.budgeted import BudgetPolicy
from kvprune.policy.decode import takes_steps
from kvprune.testing.conformance.common.budgets import (
    keeping_all,
    reading_all,
    stated_budget,
    widening,
)
from kvprune.testing.conformance.layers import (
    answers,
    budget,
    environment,
    merging,
    prefill_policies,
    purity,
    text_pruning,
    visibility,
)
from kvprune.testing.conformance.models import (
    cache_contents,
    decoding,
    history,
    rereading,
    rows,
    selections,
    stepping,
)
from kvprune.testing.conformance.models.merging import check_mass
from kvprune.testing.conformance.models.scenario import Scenario
from kvprune.testing.conformance.policies.corner_cases import LAYER_CORNERS
from kvprune.testing.problems import LayerProblem

__all__ = [
    "CLASS",
    "COMPARING_RESULTS",
    "INVARIANTS",
    "ON_TWO_DEVICES",
    "WITH_EVERY_BUDGET",
    "Invariant",
    "LayerCheck",
    "ModelCheck",
    "is_exact",
]

LayerCheck = Callable[[CrossKVPolicy, LayerProblem], None]
ModelCheck = Callable[[CrossKVPolicy, Scenario], None]


@dataclass(frozen=True)
class Invariant:
    """One row of the suite.

    Attributes:
        id: As in docs/invariants.md, or a word.
        title: What is checked, in a few words.
        on_layers: Checks of what a policy answers about layer problems.
        on_models: Checks of runs of tiny models.
        inapplicable: Returns why a policy cannot be checked, or "".
        representative: Returns a key; of several policies with the same key, one is checked.
        limits: Returns what cannot be checked on this machine, or "".
    """

    id: str
    title: str
    on_layers: tuple[LayerCheck, ...] = ()
    on_models: tuple[ModelCheck, ...] = ()
    inapplicable: Callable[[CrossKVPolicy], str] = lambda policy: ""
    representative: Callable[[CrossKVPolicy], object] = lambda policy: policy
    limits: Callable[[], str] = lambda: ""


def _no_budget(policy: CrossKVPolicy) -> str:
    if stated_budget(policy) is None:
        return f"{policy.spec} states no budget (keep_ratio or keep_tokens) to count"
    declares = isinstance(policy, BudgetPolicy) and policy.exact_budget is not None
    if not declares and not policy.ranks_tokens:
        return f"{policy.spec} has a budget but does not rank tokens (ranks_tokens is False)"
    says_so = type(policy).exact_budget is not CrossKVPolicy.exact_budget
    if says_so and policy.exact_budget is None:
        return f"{policy.spec} declares that its budget is not exact (exact_budget is None)"
    return ""


def _not_keeping_all(policy: CrossKVPolicy) -> str:
    if keeping_all(policy) is not None:
        return ""
    if all(answers.decides_nothing(policy, problem) for problem in LAYER_CORNERS[:6]):
        return ""
    return f"{policy.spec} has no keep_ratio that could be 1, and does not keep all tokens by itself"


def _not_ranking(policy: CrossKVPolicy) -> str:
    if not policy.ranks_tokens:
        return f"{policy.name} does not rank tokens (ranks_tokens is False)"
    return "" if len(widening(policy)) > 1 else f"{policy.spec} has no option that states a budget"


def _not_merging(policy: CrossKVPolicy) -> str:
    if any(merging.merges(policy, problem) for problem in LAYER_CORNERS[:6]):
        return ""
    return f"{policy.spec} merges nothing"


def _knows_order(policy: CrossKVPolicy) -> str:
    return f"{policy.spec} knows entries by their place in decode steps" if takes_steps(policy) else ""


def _no_steps(policy: CrossKVPolicy) -> str:
    return "" if takes_steps(policy) else f"{policy.spec} decides nothing in decode steps"


def _not_reading_all(policy: CrossKVPolicy) -> str:
    return _no_steps(policy) or ("" if reading_all(policy) else f"{policy.spec} has no keep_ratio")


def _one_device() -> str:
    return "" if torch.cuda.is_available() else "devices were not compared: this machine has no CUDA device"


INVARIANTS = (
    Invariant(
        "KV01",
        "shape and order of what is kept",
        (answers.check_shape, text_pruning.check_text),
        (selections.check_columns,),
    ),
    Invariant(
        "KV02",
        "the exact budget",
        (budget.check_budget, prefill_policies.check_budget_of_layers),
        (selections.check_counts,),
        _no_budget,
    ),
    Invariant("KV03", "never empty, for no image", (visibility.check_groups,), (selections.check_images,)),
    Invariant(
        "KV04", "padding goes before visible tokens", (visibility.check_visible,), (selections.check_padding,)
    ),
    Invariant("KV05", "no row goes blind", (visibility.check_rows,), (selections.check_prefill_rows,)),
    Invariant(
        "KV06", "masks as wide as what is held", (purity.check_answers_stay,), (decoding.check_mask_width,)
    ),
    Invariant(
        "KV07",
        "keeping all is bit-identical",
        (budget.check_keeps_all,),
        (decoding.check_identity,),
        _not_keeping_all,
        keeping_all,
    ),
    Invariant(
        "KV08",
        "dropping only the unseen is lossless",
        (budget.check_keeps_all,),
        (decoding.check_lossless,),
        _not_keeping_all,
        keeping_all,
    ),
    Invariant(
        "KV09", "the order of kept tokens is irrelevant", (), (decoding.check_storage_order,), _knows_order
    ),
    Invariant(
        "KV10",
        "purity",
        (
            purity.check_inputs,
            purity.check_instance,
            environment.check_randomness,
            purity.check_order,
            environment.check_clock,
            environment.check_devices,
            purity.check_references,
            purity.check_alone,
            prefill_policies.check_alone_in_layers,
            text_pruning.check_text_alone,
        ),
        (selections.check_repeatable, selections.check_alone_in_model),
        limits=_one_device,
    ),
    Invariant("KV11", "tensors and selection stay together", (), (cache_contents.check_alignment,)),
    Invariant("KV12", "nothing is left behind", (environment.check_process,), (decoding.check_clean_exit,)),
    Invariant("KV13", "the master oracle", (), (decoding.check_oracle,)),
    Invariant(
        "KV14",
        "a larger budget keeps a superset",
        (budget.check_monotone, prefill_policies.check_monotone_in_layers),
        (),
        _not_ranking,
        lambda policy: tuple(map(str, (variant.spec for variant in widening(policy)))),
    ),
    Invariant(
        "KV15",
        "merging: a partition, mass preserved",
        (merging.check_partition,),
        (check_mass,),
        _not_merging,
    ),
    Invariant(
        "KV16",
        "a step that reads everything equals full",
        (),
        (stepping.check_reads_everything,),
        _not_reading_all,
        reading_all,
    ),
    Invariant(
        "KV17",
        "a step depends on its own sample alone",
        (),
        (stepping.check_steps_alone,),
        _no_steps,
    ),
    Invariant("views", "a run changes nothing that it shows", (), (history.check_views_in_runs,)),
    Invariant("history", "the same answer whatever ran before", (), (history.check_history,)),
    Invariant("rows", "rows of equal inputs stay apart", (), (rows.check_rows_of_equal_inputs,)),
    Invariant("padding", "a sample that is all padding", (), (rows.check_empty_sample,)),
    Invariant("reread", "the last token is read again", (), (rereading.check_rereading,)),
)

CLASS = Invariant("class", "options, specs and documentation")

WITH_EVERY_BUDGET: tuple[LayerCheck, ...] = (budget.check_budget, prefill_policies.check_budget_of_layers)
"""Checks that pose each corner case to every policy; others pose it to three."""

ON_TWO_DEVICES: tuple[LayerCheck, ...] = (environment.check_devices,)
"""Checks that need a CUDA device."""

COMPARING_RESULTS: tuple[LayerCheck, ...] = (
    purity.check_alone,
    prefill_policies.check_alone_in_layers,
    text_pruning.check_text_alone,
    environment.check_devices,
)
"""Checks that compare two computations of the same answer, posed only problems that `is_exact` accepts."""


def is_exact(problem: LayerProblem) -> bool:
    """Return whether no ties of scores let rounding decide, and there are samples to compare."""
    return (
        len(problem.layouts) > 1 and problem.content == "random" and problem.dtype in ("float32", "float64")
    )
