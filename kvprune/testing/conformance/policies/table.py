"""The whole suite on one page: which check of which invariant runs, and when it does not apply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.budgeted import ScoringPolicy
from kvprune.testing.conformance.common.budgets import keeping_all, stated_budget, widening
from kvprune.testing.conformance.layers import (
    decisions,
    merges,
    purity,
    several_layers,
    surroundings,
    texts,
)
from kvprune.testing.conformance.models import alignment, decoding, held, mass
from kvprune.testing.conformance.models.setting import Setting
from kvprune.testing.conformance.policies.corners import LAYER_CORNERS
from kvprune.testing.problems import LayerProblem

__all__ = ["CLASS", "INVARIANTS", "Invariant", "LayerCheck", "ModelCheck"]

LayerCheck = Callable[[CrossKVPolicy, LayerProblem], None]
ModelCheck = Callable[[CrossKVPolicy, Setting], None]


@dataclass(frozen=True)
class Invariant:
    """One row of the suite.

    Attributes:
        id: As in docs/invariants.md.
        title: What is checked, in a few words.
        on_layers: Checks of the policy's answers on one layer's view.
        on_models: Checks of whole runs of tiny models.
        inapplicable: Returns why a policy cannot be checked, or "".
        representative: What two policies have in common that need not both be checked.
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
        return f"{policy.spec} states no budget (keep_ratio, keep_tokens) that could be counted"
    if not isinstance(policy, ScoringPolicy) and not policy.ranks_tokens:
        return f"{policy.spec} has a budget but does not say that it ranks tokens (ranks_tokens is False)"
    says_so = type(policy).exact_budget is not CrossKVPolicy.exact_budget
    if says_so and policy.exact_budget is None:
        return f"{policy.spec} says that its budget is not exact (exact_budget is None)"
    return ""


def _not_keeping_all(policy: CrossKVPolicy) -> str:
    if keeping_all(policy) is not None:
        return ""
    if all(decisions.decides_nothing(policy, problem) for problem in LAYER_CORNERS[:6]):
        return ""
    return f"{policy.spec} has no keep_ratio that could be 1, and does not keep all as it is"


def _not_ranking(policy: CrossKVPolicy) -> str:
    if not policy.ranks_tokens:
        return f"{policy.name} does not say that it ranks tokens (ranks_tokens is False)"
    return "" if len(widening(policy)) > 1 else f"{policy.spec} has no option that states a budget"


def _not_merging(policy: CrossKVPolicy) -> str:
    if any(merges.merges(policy, problem) for problem in LAYER_CORNERS[:6]):
        return ""
    return f"{policy.spec} merges nothing"


def _one_device() -> str:
    return "" if torch.cuda.is_available() else "devices were not compared: there is no CUDA device here"


INVARIANTS = (
    Invariant(
        "KV01",
        "shape and order of what is kept",
        (decisions.check_shape, texts.check_text),
        (held.check_columns,),
    ),
    Invariant(
        "KV02",
        "the exact budget",
        (decisions.check_budget, several_layers.check_budget_of_layers),
        (held.check_counts,),
        _no_budget,
    ),
    Invariant("KV03", "never empty, for no image", (decisions.check_groups,), (held.check_images,)),
    Invariant(
        "KV04", "padding goes before visible tokens", (decisions.check_visible,), (held.check_padding,)
    ),
    Invariant("KV05", "no row goes blind", (decisions.check_rows,), (held.check_prefill_rows,)),
    Invariant(
        "KV06", "masks as wide as what is held", (purity.check_answers_stay,), (decoding.check_mask_width,)
    ),
    Invariant(
        "KV07",
        "keeping all is bit-identical",
        (decisions.check_keeps_all,),
        (decoding.check_identity,),
        _not_keeping_all,
        keeping_all,
    ),
    Invariant(
        "KV08",
        "dropping only the unseen is lossless",
        (decisions.check_keeps_all,),
        (decoding.check_lossless,),
        _not_keeping_all,
        keeping_all,
    ),
    Invariant("KV09", "the order of kept tokens is irrelevant", (), (decoding.check_storage_order,)),
    Invariant(
        "KV10",
        "purity",
        (
            purity.check_inputs,
            purity.check_instance,
            surroundings.check_randomness,
            purity.check_order,
            surroundings.check_clock,
            surroundings.check_devices,
            purity.check_references,
            purity.check_alone,
            several_layers.check_alone_in_layers,
            texts.check_text_alone,
        ),
        (held.check_repeatable, held.check_alone_in_model),
        limits=_one_device,
    ),
    Invariant("KV11", "tensors and selection stay together", (), (alignment.check_alignment,)),
    Invariant("KV12", "nothing is left behind", (surroundings.check_process,), (decoding.check_clean_exit,)),
    Invariant("KV13", "the master oracle", (), (decoding.check_oracle,)),
    Invariant(
        "KV14",
        "a larger budget keeps a superset",
        (decisions.check_monotone, several_layers.check_monotone_in_layers),
        (),
        _not_ranking,
        lambda policy: tuple(map(str, (variant.spec for variant in widening(policy)))),
    ),
    Invariant(
        "KV15",
        "merging: a partition, mass preserved",
        (merges.check_partition,),
        (mass.check_mass,),
        _not_merging,
    ),
)

CLASS = Invariant("class", "options, specs and documentation")
