"""The policies of ``kvprune compare --all``: every built-in method that takes a ``keep_ratio``."""

from __future__ import annotations

import typing
from dataclasses import dataclass, replace

from kvprune.adapters.base import ModelAdapter
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


def every_policy(installed: Registry | None = None, adapter: type[ModelAdapter] | None = None) -> Everything:
    """Return specs of all built-in policies that take a ``keep_ratio``, without the budget itself.

    Policies that read the answer are references and no methods, so they are left out; see `answer_attention`.

    Args:
        installed: The policies to choose from; None is all that are installed.
        adapter: Policies that need what this adapter of a model cannot capture are left out; None leaves out
            none of them.
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
        options = {"reach": "onward"} if "onward" in typing.get_args(types.get("reach")) else {}
        spec = PolicySpec(name, options)
        missing = () if adapter is None else _missing(found, spec, adapter)
        if adapter is not None and missing:
            left_out[name] = (
                f"needs {', '.join(missing)}, which the {adapter.family} adapter does not provide"
            )
            continue
        specs.append(str(spec))
    return Everything(tuple(specs), left_out)


def _missing(installed: Registry, spec: PolicySpec, adapter: type[ModelAdapter]) -> list[str]:
    """Return what a policy needs and an adapter does not provide."""
    policy = installed.resolve(replace(spec, options={**spec.options, "keep_ratio": 0.5})).policy
    return sorted(policy.needs - adapter.provides)
