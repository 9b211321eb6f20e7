"""Reads what a policy says about itself, and names the policy if it cannot say it, or says something else.

Properties of a policy are its author's code. They are read in many places, where an error would name neither
the policy nor the property, so `require_declarations` reads each once before anything runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import get_args

from kvprune.errors import KVPruneError, PolicyFailedError
from kvprune.policy.base import CrossKVPolicy, Need
from kvprune.policy.decode import DecodePolicy
from kvprune.policy.nesting import parts
from kvprune.policy.spec import PolicySpec
from kvprune.text import error_line, shown, suggestion
from kvprune.tokens.budget import Budget

__all__ = ["NEEDS", "require_declarations"]

NEEDS: tuple[str, ...] = get_args(Need)
"""All that a policy can need, and an adapter provide."""


def require_declarations(policy: CrossKVPolicy) -> None:
    """Raise unless a policy, and each policy among its options, says what it is and what it needs.

    Raises:
        PolicyFailedError: If reading a property raises, or it has a wrong value; names the policy, the
            property, and what would be right.
    """
    for part in reversed(list(parts(policy))):  # inner ones first: their errors would be the outer one's
        named = f"policy {shown(_class_name(part), 80)}"
        declared = _DECLARED | _OF_STEPS if isinstance(part, DecodePolicy) else _DECLARED
        for what, (is_right, right) in declared.items():
            try:
                value = getattr(part, what)
                fits = is_right(value)
            except (KVPruneError, MemoryError):
                raise
            except Exception as error:
                raise PolicyFailedError(
                    f"{named} raised {error_line(error, 500)}, when it was asked for its {what}"
                ) from error
            if not fits:
                hint = _hint(value) if what == "needs" else ""
                raise PolicyFailedError(f"{named} has the {what} {shown(value)}; expected {right}{hint}")
        if isinstance(part, DecodePolicy) and part.offloads and not part.foresees:
            raise PolicyFailedError(
                f"{named} has offloads = True, but its class does not say foresees = True: each step would "
                "wait for all that it may read; off-load a policy that chooses from its state alone, such as "
                "attnpred"
            )


def _class_name(policy: CrossKVPolicy) -> str:
    """Return the name that stands in the class; the instance's own may be what raises."""
    name = getattr(type(policy), "name", None)
    return name if isinstance(name, str) else type(policy).__name__


def _is_needs(value: object) -> bool:
    return isinstance(value, frozenset | set) and all(need in NEEDS for need in value)


def _hint(needs: object) -> str:
    """Return what the author may have meant by needs that do not exist."""
    if isinstance(needs, str):
        needs = {needs}
    if not isinstance(needs, frozenset | set | list | tuple):
        return ""
    if all(need in NEEDS for need in needs):
        return f"; write needs = frozenset({{{', '.join(map(repr, sorted(needs)))}}})"
    unknown = next(need for need in needs if need not in NEEDS)
    return suggestion(unknown, NEEDS)


def _is_requested(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(asked, int | float) and math.isfinite(asked)
        for name, asked in value.items()
    )


_DECLARED: dict[str, tuple[Callable[[object], bool], str]] = {
    "name": (lambda value: isinstance(value, str), "text"),
    "spec": (lambda value: isinstance(value, PolicySpec), "a kvprune.PolicySpec"),
    "needs": (_is_needs, f"a frozenset of some of {', '.join(map(repr, NEEDS))}"),
    "exact_budget": (lambda value: value is None or isinstance(value, Budget), "a kvprune.Budget, or None"),
    "requested": (_is_requested, 'finite numbers by name, such as {"keep_ratio": 0.5}'),
    "budget_scope": (lambda value: value in ("head", "layer", "model"), '"head", "layer" or "model"'),
    "reads_answer": (lambda value: isinstance(value, bool), "True or False"),
    "keeps_invisible": (lambda value: isinstance(value, bool), "True or False"),
    "ranks_tokens": (lambda value: isinstance(value, bool), "True or False"),
}
"""What is read of each policy, whether a value is right, and what would be."""

_OF_STEPS: dict[str, tuple[Callable[[object], bool], str]] = {
    name: (lambda value: isinstance(value, bool), "True or False") for name in ("foresees", "offloads")
}
"""The same, of policies that decide in decode steps."""
