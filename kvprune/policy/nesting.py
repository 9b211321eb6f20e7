"""Policies as options of other policies, for example an allocator that uses any scorer.

The outer policy decides how many tokens are kept, and the inner one ranks them. So an inner policy has no
budget of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import get_args

from kvprune.errors import PolicyOptionError
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.budgeted import ScoringPolicy
from kvprune.policy.decode import takes_steps
from kvprune.policy.options import describe_type, policy_types
from kvprune.policy.spec import OptionValue, PolicySpec, written
from kvprune.text import shown

__all__ = ["make_nested", "parts", "require_scorer"]

_OUTER = ("keep_ratio", "keep_tokens", "reach", "whole_layers")
"""Options of a scorer that the outer policy decides."""


def require_scorer(outer: str, scorer: ScoringPolicy) -> None:
    """Check that a scorer sets no option that the policy around it decides.

    Call it in the ``__post_init__`` of the outer policy, after ``super().__post_init__()``.

    Args:
        outer: Name of the policy whose option the scorer is.
        scorer: The scorer. Only its ``score`` is used.

    Raises:
        PolicyOptionError: If it is not a `ScoringPolicy`; if it decides in decode steps; or it sets
            ``keep_ratio``, ``keep_tokens`` or ``reach``, which would be ignored; says what to write instead.
    """
    if not isinstance(scorer, ScoringPolicy):
        raise PolicyOptionError(f"policy {outer!r} needs a policy that ranks tokens, got {shown(scorer)}")
    spec = scorer.nested_spec
    if takes_steps(scorer):
        raise PolicyOptionError(
            f"policy {outer!r} decides when the prompt has been read; the scorer {shown(written(spec))} also "
            "decides in decode steps, which would be ignored; use it alone, or a scorer that takes no steps"
        )
    stated = [option for option in _OUTER if option in spec.options]
    if stated:
        rest = {option: value for option, value in spec.options.items() if option not in _OUTER}
        raise PolicyOptionError(
            f"policy {outer!r} decides how much is kept and where; the scorer {shown(written(spec))} "
            f"sets {' and '.join(stated)}, which would be ignored; write "
            f"{shown(written(PolicySpec(spec.name, rest)))}, and set the budget of {outer!r}"
        )


def parts(policy: CrossKVPolicy) -> Iterator[CrossKVPolicy]:
    """Yield a policy and all policies in its options, at any depth."""
    yield policy
    for option in dataclasses.fields(policy):
        value = getattr(policy, option.name)
        if isinstance(value, CrossKVPolicy):
            yield from parts(value)


def make_nested(
    cls: type[CrossKVPolicy],
    options: Mapping[str, OptionValue | CrossKVPolicy],
    make: Callable[[PolicySpec], CrossKVPolicy],
    classes: Mapping[str, type[CrossKVPolicy]],
) -> dict[str, OptionValue | CrossKVPolicy]:
    """Return a policy's options, with policies in place of the specs of inner policies.

    Args:
        cls: Class of the outer policy.
        options: Its options. An option that is a policy is given as a spec or as the name of a policy.
        make: Builds a policy from a spec.
        classes: Policy classes by name, to list the right ones in messages.

    Raises:
        SpecError: If text is not the name of a policy.
        PolicyOptionError: If the inner policy is not of the type that the option takes.
        KVPruneError: Whatever ``make`` raises.
    """
    types = cls.option_types()
    made: dict[str, OptionValue | CrossKVPolicy] = dict(options)
    for option, value in options.items():
        annotation = types.get(option)
        wanted = policy_types(annotation)
        if not wanted or not isinstance(value, str | PolicySpec):
            continue
        if isinstance(value, str) and value.lower() == "none" and type(None) in get_args(annotation):
            continue
        where = f"option {option!r} of policy {cls.name!r}"
        spec = _inner_spec(where, option, value)
        found = classes.get(spec.name)
        if found is not None and not issubclass(found, wanted):
            right = ", ".join(name for name, other in classes.items() if issubclass(other, wanted))
            raise PolicyOptionError(
                f"{where} must be {describe_type(annotation)}, got {shown(written(spec))} "
                f"(installed: {right or 'none'})"
            )
        made[option] = make(spec)
    return made


def _inner_spec(where: str, option: str, value: str | PolicySpec) -> PolicySpec:
    if isinstance(value, PolicySpec):
        return value
    if ":" in value:
        inner = value.partition(":")[0]
        raise PolicyOptionError(
            f"{where} is {shown(value)}; the options of an inner policy are written in parentheses, "
            f"such as {option}={inner}(key=value;key=value)"
        )
    return PolicySpec(value)
