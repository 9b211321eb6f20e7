"""Which configurations a comparison runs: policies crossed with keep ratios, references once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from kvprune.comparison.plan.settings import NO_GUIDE
from kvprune.errors import ContrastError, KVPruneError, PolicyOptionError, SpecError
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.nesting import parts
from kvprune.policy.spec import PolicySpec
from kvprune.session import registry
from kvprune.session.contrast_rules import CombineRule
from kvprune.session.registry import Registry
from kvprune.session.rules import get_rule
from kvprune.text import suggestion

__all__ = [
    "ANSWER_ATTENTION",
    "BUDGETS",
    "DEFAULT_KEEP_RATIOS",
    "DEFAULT_POLICIES",
    "REFERENCE",
    "Configuration",
    "GuideRole",
    "answer_attention",
    "exactly",
    "expand",
    "partner",
    "unite",
    "with_guide",
]

REFERENCE = "full"
"""The policy that every other one is compared with; it drops nothing."""

ANSWER_ATTENTION = "answer-attention"
"""The reference that may look at the answer of the full cache; it is no method."""

DEFAULT_POLICIES = (
    "lossless",
    "uniform:reach=onward",
    "random:reach=onward",
    "norm:reach=onward",
    "keydiff:reach=onward",
    "divprune",
    "snapkv:reach=onward",
    "fastv",
    "trim",
)
"""All that drop something decide at the first cross-attention layer or before: one-token answers show it."""

DEFAULT_KEEP_RATIOS = (0.5, 0.25, 0.1, 0.05)

BUDGETS = ("keep_ratio", "keep_tokens", "k_ratio")
"""Options that state how much is kept."""


GuideRole = Literal["guides", "answers"]
"""What the guide of a comparison does in a configuration: rank tokens for the model, or answer alone."""

_ROLES: Mapping[GuideRole, tuple[str, str]] = MappingProxyType(
    {"guides": ("guide", "other"), "answers": ("model", "guide")}
)
"""How a spec in a comparison says so, with an option that is not the policy's."""


CONTRAST = "contrast"
"""How a spec in a comparison says by which rule `kvprune.contrast` joins its policy with the full cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """One policy with all its options: a row of the table.

    Attributes:
        policy: what `kvprune.compress` gets.
        spec: its canonical spec; with a `guide`, one more option says what that does.
        label: the spec without its budget; configurations of one label make one curve.
        budget: the budget as text, such as ``keep_ratio=0.25``; empty where the policy has none.
        keep_ratio: the requested fraction of visible tokens, where the budget is one.
        reach: the option of this name, where the policy has one.
        plugin: entry point that provides the policy.
        distribution: installed distribution of that entry point.
        inner: installed distributions of the policies among its options.
        guide: what the guide of the comparison does; None where it takes no part.
        contrast: the rule that combines what the policy leaves with the full cache; None where the policy
            answers alone.
    """

    policy: CrossKVPolicy
    spec: str
    label: str
    budget: str
    keep_ratio: float | None
    reach: str | None
    plugin: str
    distribution: str
    inner: tuple[str, ...] = ()
    guide: GuideRole | None = None
    contrast: CombineRule | None = None


def expand(policies: Sequence[str | PolicySpec], keep_ratios: Sequence[float]) -> tuple[Configuration, ...]:
    """Cross policies that state no budget with `keep_ratios`; the reference comes first, nothing comes twice.

    Args:
        policies: Specs; one that states a budget, or has none, runs as it is.
        keep_ratios: Fractions of visible tokens to keep, in (0, 1].

    Raises:
        PolicyOptionError: If a ratio is out of range, there is none to cross with, or an option is wrong.
        UnknownPolicyError: If a policy is not installed.
    """
    for ratio in keep_ratios:
        if not (isinstance(ratio, float | int) and math.isfinite(ratio) and 0 < ratio <= 1):
            raise PolicyOptionError(f"keep ratio {ratio!r} is not a fraction in (0, 1]")
    installed = registry.load()
    found = {REFERENCE: _configure(installed, PolicySpec(REFERENCE))}
    for given in policies:
        spec = PolicySpec.parse(given) if isinstance(given, str) else given
        for one in _cross(spec, installed.policy_class(spec.name), keep_ratios):
            configuration = _configure(installed, one)
            found.setdefault(configuration.spec, configuration)
    return tuple(found.values())


def exactly(specs: Sequence[str]) -> tuple[Configuration, ...]:
    """Return one configuration per spec, as it is and in this order: how a manifest names them.

    Raises:
        KVPruneError: If a spec is damaged, or its policy is not installed or has other options now.
    """
    installed = registry.load()
    return tuple(replace(_configure(installed, PolicySpec.parse(spec)), spec=spec) for spec in specs)


def with_guide(configurations: Sequence[Configuration]) -> tuple[Configuration, ...]:
    """Add what a guide can do: guide in place of the model itself, and answer alone with its full cache.

    Args:
        configurations: What is compared, the full cache first.

    Returns:
        The full cache; the guide alone; and the others, each that asks for guidance followed by itself with
        the guide. If none asks, nothing is added.

    Raises:
        PolicyOptionError: If a policy has an option of its own where its spec would name the guide.
    """
    found: dict[str, Configuration] = {}
    for one in configurations:
        found.setdefault(one.spec, one)
        if one.guide is None and _may("guides", one):
            other = _in_role(one, "guides")
            found.setdefault(other.spec, other)
    if not any(one.guide for one in found.values()):
        return tuple(found.values())
    reference, *others = found.values()
    alone = _in_role(reference, "answers")
    return (reference, *{one.spec: one for one in (alone, *others)}.values())


def answer_attention(configurations: Sequence[Configuration]) -> tuple[Configuration, ...]:
    """Return the reference that may look at the answer, once for each keep ratio in use.

    Args:
        configurations: What is compared.

    Returns:
        Nothing where no policy of this name is installed.
    """
    installed = registry.load()
    if ANSWER_ATTENTION not in installed.policies:
        return ()
    ratios = dict.fromkeys(one.keep_ratio for one in configurations if one.keep_ratio is not None)
    return tuple(
        _configure(installed, PolicySpec(ANSWER_ATTENTION, {"keep_ratio": ratio})) for ratio in ratios
    )


def unite(
    earlier: Sequence[str], wanted: Sequence[Configuration], *, with_answer_attention: bool
) -> tuple[tuple[Configuration, ...], Mapping[str, str]]:
    """Return the union of what a results folder compares and what is asked for now.

    Args:
        earlier: Specs of the folder, in order.
        wanted: Configurations asked for now, the full cache first.
        with_answer_attention: Add the reference that may look at the answer.

    Returns:
        The full cache, the earlier configurations in their order, the new ones, and last those of
        `answer_attention`; and the earlier specs that do not run any more, with the reason.
    """
    found = {one.spec: one for one in wanted[:1]}
    asked = {one.spec: one for one in wanted}
    gone = {}
    for spec in earlier:
        try:
            found[spec] = asked[spec] if spec in asked else exactly([spec])[0]
        except KVPruneError as error:
            gone[spec] = str(error)
    found |= asked
    if with_answer_attention:
        found |= {one.spec: one for one in answer_attention(tuple(found.values())) if one.spec not in found}
    return tuple(sorted(found.values(), key=lambda one: one.policy.reads_answer)), gone


def partner(against: str, configurations: Sequence[Configuration], *, optional: bool = False) -> str:
    """Return the label or name of the policy that others are compared with.

    Args:
        against: A label, which is a spec without its budget, or the name of a policy.
        configurations: What is compared.
        optional: Return `against` where nothing has this label or name.

    Returns:
        The label as the table has it, or the name.

    Raises:
        PolicyOptionError: If there is no such label or name; lists what there is.
    """
    labels = list(dict.fromkeys(one.label for one in configurations))
    try:
        label = str(PolicySpec.parse(against))
    except SpecError:
        label = against
    if label in labels:
        return label
    if optional or any(one.policy.name == against for one in configurations):
        return against
    raise PolicyOptionError(
        f"there is no {against!r} to compare with{suggestion(against, labels)}; "
        f"choose one of: {', '.join(labels)}"
    )


def _cross(spec: PolicySpec, cls: type[CrossKVPolicy], keep_ratios: Sequence[float]) -> list[PolicySpec]:
    """Return one spec per keep ratio; the spec as it is if it states a budget or its policy takes none."""
    budgets = {*BUDGETS, *getattr(cls, "budget_alternatives", ())}
    if "keep_ratio" not in cls.option_types() or budgets & spec.options.keys():
        return [spec]
    if not keep_ratios:
        raise PolicyOptionError(
            f"policy {str(spec)!r} states no budget, and there is no keep ratio to cross it with"
        )
    return [replace(spec, options={**spec.options, "keep_ratio": ratio}) for ratio in keep_ratios]


def _may(role: GuideRole, one: Configuration) -> bool:
    """Whether the guide can have a role in a configuration: only the full cache is answered by it alone."""
    if role == "answers":
        return one.spec == REFERENCE
    return "guidance" in one.policy.needs and not one.policy.reads_answer and one.contrast is None


def _in_role(one: Configuration, role: GuideRole) -> Configuration:
    """Return a configuration in which the guide has a role; its spec and label say so."""
    option, value = _ROLES[role]
    if option in type(one.policy).option_types():
        raise PolicyOptionError(
            f"policy {one.policy.name!r} has an option {option!r} of its own, so its spec cannot say that "
            f"{option}={value}; compare it with --guide {NO_GUIDE} (Settings.guide)"
        )

    def named(text: str) -> str:
        spec = PolicySpec.parse(text)
        return str(replace(spec, options={option: value, **spec.options}))

    return replace(one, spec=named(one.spec), label=named(one.label), guide=role)


def _contrasted(one: Configuration, rule: object) -> Configuration:
    """Return a configuration whose policy prunes the second branch of a contrast; spec and label say so.

    Raises:
        ContrastError: If there is no such rule, or the policy may look at the answer.
    """
    combine = get_rule(str(rule))
    if one.policy.reads_answer or one.contrast is not None:
        raise ContrastError(f"{one.spec} is a reference and no second branch; contrast another policy")
    written = combine.short_spec

    def named(text: str) -> str:
        spec = PolicySpec.parse(text)
        return str(replace(spec, options={CONTRAST: written, **spec.options}))

    return replace(one, spec=named(one.spec), label=named(one.label), contrast=combine)


def _configure(installed: Registry, spec: PolicySpec) -> Configuration:
    own = installed.policy_class(spec.name).option_types()
    if CONTRAST in spec.options and CONTRAST not in own:
        rest = {name: given for name, given in spec.options.items() if name != CONTRAST}
        return _contrasted(_configure(installed, replace(spec, options=rest)), spec.options[CONTRAST])
    for role, (option, value) in _ROLES.items():
        if option not in own and spec.options.get(option) == value:
            rest = {name: given for name, given in spec.options.items() if name != option}
            one = _configure(installed, replace(spec, options=rest))
            if _may(role, one):
                return _in_role(one, role)
    resolved = installed.resolve(spec)
    policy = resolved.policy
    values = policy.option_values
    budget = {option: values[option] for option in BUDGETS if values.get(option) is not None}
    rest = {option: value for option, value in policy.spec.options.items() if option not in BUDGETS}
    # A policy that is the default of an option need not be installed.
    inner = [installed.resolve(part).distribution for part in parts(policy) if part is not policy]
    return Configuration(
        policy=policy,
        spec=str(policy.spec),
        label=str(PolicySpec(policy.name, rest)),
        budget=", ".join(f"{option}={value}" for option, value in budget.items()),
        keep_ratio=budget.get("keep_ratio"),
        reach=getattr(policy, "reach", None),
        plugin=resolved.plugin,
        distribution=resolved.distribution,
        inner=tuple(distribution for distribution in inner if distribution),
    )
