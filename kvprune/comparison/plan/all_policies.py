"""Which policies ``kvprune compare --all`` runs: every built-in one that can meet an equal budget."""

from __future__ import annotations

import typing
from dataclasses import dataclass

from kvprune.policy.options import required_options
from kvprune.policy.spec import PolicySpec
from kvprune.session import registry
from kvprune.session.registry import Registry

__all__ = ["Everything", "every_policy"]

_OWN = "kvprune"
"""The distribution whose policies are built in."""


@dataclass(frozen=True, slots=True)
class Everything:
    """What is compared, and what is not.

    Attributes:
        specs: of built-in policies that take a ``keep_ratio``, in order of their names; with ``reach=onward``
            where they have this option.
        left_out: why a built-in policy that takes a ``keep_ratio`` is not among them, by name.
    """

    specs: tuple[str, ...]
    left_out: typing.Mapping[str, str]


def every_policy(installed: Registry | None = None) -> Everything:
    """Return specs of all built-in policies that take a ``keep_ratio``, without the budget itself.

    Args:
        installed: Where to look; what is installed by default.
    """
    found = registry.load() if installed is None else installed
    specs, left_out = [], {}
    for name in sorted(found.policies):
        entry = found.policies[name]
        types = entry.cls.option_types()
        if entry.distribution != _OWN or "keep_ratio" not in types:
            continue
        required = required_options(entry.cls)
        if required:
            left_out[name] = f"needs {', '.join(required)}; add it with --policy"
            continue
        onward = "onward" in typing.get_args(types.get("reach"))
        specs.append(str(PolicySpec(name, {"reach": "onward"} if onward else {})))
    return Everything(tuple(specs), left_out)
