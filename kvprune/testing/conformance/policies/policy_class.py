"""Checks of a policy's class: its options, its needs, and that specs make the same policy again."""

from __future__ import annotations

import copy
import dataclasses
import pickle

from kvprune.errors import PolicyFailedError
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.declarations import require_declarations
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
        _check_declarations(policy)
        try:
            pickle.dumps(policy)
        except (pickle.PicklingError, AttributeError) as error:
            if "<locals>" not in cls.__qualname__:
                raise Violation("a policy that can be pickled", f"{error}") from error


def _check_declarations(policy: CrossKVPolicy) -> None:
    """Check what the policy says about itself; a run would refuse the same."""
    try:
        require_declarations(policy)
    except PolicyFailedError as error:
        raise Violation("a policy that says what it is and what it needs", str(error)) from error
    if not isinstance(policy.needs, frozenset):  # a set that somebody else holds could change
        raise Violation("needs to be a frozenset", f"{policy.needs!r}")


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
