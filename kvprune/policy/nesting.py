"""Policies as options of policies: an allocator over any scorer.

The outer policy decides how much is kept and the inner one what; so an inner one states no budget.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import get_args

from kvprune.errors import PolicyOptionError
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.budgeted import ScoringPolicy
from kvprune.policy.options import describe_type, policy_types
from kvprune.policy.spec import OptionValue, PolicySpec, written
from kvprune.text import shown

__all__ = ["make_nested", "parts", "require_scorer"]

_OUTER = ("keep_ratio", "keep_tokens", "reach")
"""What an outer policy decides for its scorer."""


def require_scorer(outer: str, scorer: ScoringPolicy) -> None:
    """Raise unless a scorer leaves to the policy around it what is decided there.

    The outer policy calls it in its ``__post_init__``, after ``super().__post_init__()``.

    Args:
        outer: Name of the policy whose option the scorer is.
        scorer: The scorer; its ``score`` is all that is used of it.

    Raises:
        PolicyOptionError: If the scorer states ``keep_ratio``, ``keep_tokens`` or ``reach``, which would be
            ignored; says what to write instead.
    """
    if not isinstance(scorer, ScoringPolicy):
        raise PolicyOptionError(f"policy {outer!r} needs a policy that ranks tokens, got {shown(scorer)}")
    spec = scorer.nested_spec
    stated = [option for option in _OUTER if option in spec.options]
    if stated:
        rest = {option: value for option, value in spec.options.items() if option not in _OUTER}
        raise PolicyOptionError(
            f"policy {outer!r} decides itself how much is kept and where; the scorer {shown(written(spec))} "
            f"states {' and '.join(stated)}, which would be ignored; write "
            f"{shown(written(PolicySpec(spec.name, rest)))}, and a budget as an option of {outer!r}"
        )


def parts(policy: CrossKVPolicy) -> Iterator[CrossKVPolicy]:
    """Yield a policy, and the policies among its options, theirs included."""
    yield policy
    for option in dataclasses.fields(policy):
        value = getattr(policy, option.name)
        if isinstance(value, CrossKVPolicy):
            yield from parts(value)


def make_nested(
    cls: type[CrossKVPolicy],
    options: Mapping[str, OptionValue],
    make: Callable[[PolicySpec], CrossKVPolicy],
    classes: Mapping[str, type[CrossKVPolicy]],
) -> dict[str, OptionValue | CrossKVPolicy]:
    """Return a policy's options with policies in place of the specs of those options that are policies.

    Args:
        cls: Class of the outer policy.
        options: Its options; a spec, or the name of a policy, where the option is one.
        make: Makes a policy of a spec.
        classes: Policy classes by name, to tell what would be right.

    Raises:
        SpecError: If the text is no name.
        PolicyOptionError: If it is a policy of another kind than the option takes.
        KVPruneError: What ``make`` raises.
    """
    types = cls.option_types()
    made: dict[str, OptionValue | CrossKVPolicy] = dict(options)
    for option, value in options.items():
        wanted = policy_types(types.get(option))
        if not wanted or not isinstance(value, str | PolicySpec):
            continue
        if isinstance(value, str) and value.lower() == "none" and type(None) in get_args(types[option]):
            continue
        where = f"option {option!r} of policy {cls.name!r}"
        if isinstance(value, str) and ":" in value:
            inner = value.partition(":")[0]
            raise PolicyOptionError(
                f"{where} is {shown(value)}; a policy in a policy has its options in parentheses, "
                f"such as {option}={inner}(key=value;key=value)"
            )
        spec = PolicySpec(value) if isinstance(value, str) else value
        found = classes.get(spec.name)
        if found is not None and not issubclass(found, wanted):
            right = ", ".join(name for name, other in classes.items() if issubclass(other, wanted))
            raise PolicyOptionError(
                f"{where} must be {describe_type(types[option])}, got {shown(written(spec))} "
                f"(installed: {right or 'none'})"
            )
        made[option] = make(spec)
    return made
