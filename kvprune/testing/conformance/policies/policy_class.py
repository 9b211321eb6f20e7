"""Checks of a policy's class: its options, its needs, and that specs make the same policy again."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import get_args

from kvprune.policy.base import CrossKVPolicy, Need
from kvprune.policy.nesting import make_nested, parts
from kvprune.policy.spec import PolicySpec
from kvprune.testing.conformance.common.budgets import variants
from kvprune.testing.conformance.common.results import Violation
from kvprune.text import docstring

__all__ = ["check_class", "class_warnings"]


def check_class(cls: type[CrossKVPolicy], made: list[CrossKVPolicy]) -> None:
    """Check a class, and that its policies (``made``, or variants) can be written as specs and read again."""
    if not isinstance(cls, type) or not issubclass(cls, CrossKVPolicy):
        raise Violation("a class derived from CrossKVPolicy", repr(cls))
    cls.check_class()
    for policy in made or variants(cls):
        written = str(policy.spec)
        if (again := _made_again(cls, policy, PolicySpec.parse(written))) != policy:
            raise Violation(f"the spec {written!r} to make the same policy again", f"{again!r}")
        as_json = policy.spec.to_json()
        if (again := _made_again(cls, policy, PolicySpec.from_json(as_json))) != policy:
            raise Violation(f"the spec {as_json} to make the same policy again", f"{again!r}")
        if hash(copy.deepcopy(policy)) != hash(policy):
            raise Violation("a policy with the same hash as its copy", f"different hashes for {written}")
        known = frozenset(get_args(Need))
        if not isinstance(policy.needs, frozenset) or not policy.needs <= known:
            raise Violation(f"needs to be a frozenset of some of {sorted(known)}", f"{policy.needs!r}")
        try:
            pickle.dumps(policy)
        except (pickle.PicklingError, AttributeError) as error:
            if "<locals>" not in cls.__qualname__:
                raise Violation("a policy that can be pickled", f"{error}") from error


def _made_again(cls: type[CrossKVPolicy], policy: CrossKVPolicy, spec: PolicySpec) -> CrossKVPolicy:
    """Build a policy from its spec. Neither it nor the policies in its options need be installed."""
    classes = {part.name: type(part) for part in parts(policy)}

    def make(inner: PolicySpec) -> CrossKVPolicy:
        found = classes[inner.name]
        return found.from_options(make_nested(found, inner.options, make, classes))

    return cls.from_options(make_nested(cls, spec.options, make, classes))


def class_warnings(cls: type[CrossKVPolicy]) -> tuple[str, ...]:
    """Return what should be looked at although it is no failure: missing documentation."""
    found = []
    if not docstring(cls):
        found.append(f"{cls.__name__} has no docstring; `kvprune list` and `kvprune show` print it")
    undocumented = [
        field.name
        for field in dataclasses.fields(cls)
        if not any(f"{field.name}:" in docstring(base) for base in cls.__mro__)
    ]
    if undocumented:
        found.append(f"options without a line under Args: {', '.join(undocumented)}")
    return tuple(found)
