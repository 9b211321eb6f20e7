"""The policies of ``kvprune compare --all``: every built-in method that takes a ``keep_ratio``."""

from __future__ import annotations

import typing
from dataclasses import dataclass

from kvprune.policy.options import required_options
from kvprune.policy.spec import PolicySpec
from kvprune.session import registry
from kvprune.session.registry import Registry
from kvprune.text import REFERENCE

__all__ = ["Everything", "every_policy"]

_OWN = "kvprune"
"""Name of the distribution that the built-in policies belong to."""


@dataclass(frozen=True, slots=True)
class Everything:
    """The policies that are compared, and those that are left out.

    Attributes:
        specs: specs of built-in policies that take a ``keep_ratio``, sorted by name, with ``reach=onward``
            where the policy has this option.
        left_out: names of other built-in policies that take a ``keep_ratio``, and why each is left out.
    """

    specs: tuple[str, ...]
    left_out: typing.Mapping[str, str]


def every_policy(installed: Registry | None = None) -> Everything:
    """Return specs of all built-in policies that take a ``keep_ratio``, without the budget itself.

    Policies that read the answer are references and no methods, so they are left out; see `answer_attention`.

    Args:
        installed: The policies to choose from; None is all that are installed.
    """
    found = registry.load() if installed is None else installed
    specs, left_out = [], {}
    for name in sorted(found.policies):
        entry = found.policies[name]
        types = entry.cls.option_types()
        if entry.distribution != _OWN or "keep_ratio" not in types:
            continue
        required = required_options(entry.cls)
        if entry.cls.reads_answer:
            left_out[name] = f"is a {REFERENCE}: it reads the full cache's answer"
            continue
        if required:
            left_out[name] = f"needs {', '.join(required)}; add it with --policy"
            continue
        onward = "onward" in typing.get_args(types.get("reach"))
        specs.append(str(PolicySpec(name, {"reach": "onward"} if onward else {})))
    return Everything(tuple(specs), left_out)
