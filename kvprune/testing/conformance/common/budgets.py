"""The budget that a policy states, and the same policy with other budgets and options."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import typing
from collections.abc import Iterator
from fractions import Fraction

from kvprune.errors import KVPruneError
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.budgeted import ScoringPolicy
from kvprune.policy.decode import takes_steps
from kvprune.policy.spec import OptionValue

__all__ = [
    "KEEP_RATIOS",
    "allowance",
    "keeping_all",
    "reading_all",
    "stated_budget",
    "variants",
    "widening",
]

KEEP_RATIOS = (0.01, 0.07, 0.1, 0.3, 1.0)
"""Budgets to check. In floats, 0.07 * 100 is 7.000000000000001 and (1 - 0.9) * 10 is 0.9999999999999998."""

_HUGE = 10**6


def stated_budget(policy: CrossKVPolicy) -> tuple[float | None, int | None] | None:
    """Return keep_ratio and keep_tokens of a policy, a default filled in; None if it has neither."""
    ratio, tokens = (policy.option_values.get(name) for name in ("keep_ratio", "keep_tokens"))
    return None if ratio is None and tokens is None else (ratio, tokens)


def allowance(policy: CrossKVPolicy, visible: int) -> int:
    """Return how many of ``visible`` tokens the policy's budget keeps, in exact arithmetic, rounded up."""
    stated = stated_budget(policy)
    assert stated is not None
    ratio, tokens = stated
    if tokens is not None:
        return min(tokens, visible)
    return math.ceil(Fraction(str(ratio)) * visible)


def keeping_all(policy: CrossKVPolicy) -> CrossKVPolicy | None:
    """Return the policy with ``keep_ratio=1.0``; None if it has no such option."""
    if not any(field.name == "keep_ratio" for field in dataclasses.fields(policy)):
        return None
    text = {"text_keep": 1.0} if "text_keep" in type(policy).option_types() else {}
    return _with(policy, keep_ratio=1.0, keep_tokens=None, **text)


def reading_all(policy: CrossKVPolicy) -> CrossKVPolicy | None:
    """Return the policy with ``keep_ratio=1.0`` in decode steps; None if it has no such option.

    If it has no keep_ratio itself, the policy among its options that decides in decode steps gets it.
    """
    own = keeping_all(policy)
    if own is not None:
        return own
    for option in dataclasses.fields(policy):
        part = getattr(policy, option.name)
        inner = reading_all(part) if takes_steps(part) else None
        if inner is not None:
            return dataclasses.replace(policy, **{option.name: inner})
    return None


def widening(policy: CrossKVPolicy) -> list[CrossKVPolicy]:
    """Return the policy with budgets from small to large, in the option that states its own budget.

    This is keep_ratio or keep_tokens, or else an option named ``*_ratio`` that is set (``k_ratio``).
    """
    names = [field.name for field in dataclasses.fields(policy)]
    names.sort(key=lambda name: name not in ("keep_ratio", "keep_tokens"))
    for name in names:
        if policy.option_values[name] is None:
            continue
        if name == "keep_tokens":
            made = [_with(policy, keep_tokens=count) for count in (1, 2, 3, 5, _HUGE)]
        elif name.endswith("_ratio"):
            made = [_with(policy, **{name: ratio}) for ratio in (0.01, 0.1, 0.3, 0.5, 0.75, 1.0)]
        else:
            continue
        return [variant for variant in made if variant is not None]
    return []


def variants(cls: type[CrossKVPolicy]) -> list[CrossKVPolicy]:
    """Return policies of a class that together show what it can do; the first has default options.

    Where these do not fit every model, it has those of `CrossKVPolicy.on_any_model`.

    Each choice of a bool or Literal option is taken once, and each option for a budget with several values.

    Raises:
        KVPruneError: If the class cannot be made with default options.
    """
    default = cls.from_options(cls.on_any_model)
    made: list[CrossKVPolicy | None] = [default]
    names = set(cls.option_types())
    if "keep_ratio" in names:
        made += [_with(default, keep_ratio=ratio) for ratio in KEEP_RATIOS]
    if "keep_tokens" in names:
        made += [_with(default, keep_ratio=None, keep_tokens=count) for count in (1, _HUGE)]
    if "text_keep" in names:  # fraction of the text that a policy keeps, 1 by default
        made += [_with(default, text_keep=keep) for keep in (0.01, 0.5)]
    if issubclass(cls, ScoringPolicy):
        made += [policy and _with(policy, reach="onward") for policy in tuple(made)]
    for name, values in _choices(cls):
        if name != "reach":
            made += [_with(default, **{name: value}) for value in values]
    unique: list[CrossKVPolicy] = []
    for policy in made:
        if policy is not None and policy not in unique:
            unique.append(policy)
    return unique


def _choices(cls: type[CrossKVPolicy]) -> Iterator[tuple[str, list[OptionValue]]]:
    """Yield the name and values of each option with a finite choice."""
    for name, annotation in cls.option_types().items():
        parts = typing.get_args(annotation) if typing.get_origin(annotation) is not typing.Literal else ()
        listed = [
            (False, True) if part is bool else typing.get_args(part)
            for part in (parts or (annotation,))
            if part is bool or typing.get_origin(part) is typing.Literal
        ]
        if listed:
            yield name, list(itertools.chain.from_iterable(listed))


def _with(policy: CrossKVPolicy, **options: OptionValue) -> CrossKVPolicy | None:
    """Return the policy with other options; None if it has no option of a name, or refuses a value."""
    if "keep_ratio" in options and options["keep_ratio"] is not None:
        options.setdefault("keep_tokens", None)
    if options.get("keep_tokens") is not None:
        options.setdefault("keep_ratio", None)
    known = inspect.signature(type(policy)).parameters
    if any(name not in known and value is not None for name, value in options.items()):
        return None
    try:
        return dataclasses.replace(policy, **{n: v for n, v in options.items() if n in known})
    except KVPruneError:
        return None
