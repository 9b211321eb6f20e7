"""The policies of ``kvprune compare --all``: every built-in method that takes a ``keep_ratio``."""

from __future__ import annotations

import shlex
import typing
from dataclasses import dataclass, replace

from kvprune.adapters.base import ModelAdapter
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.nesting import parts
from kvprune.policy.options import required_options
from kvprune.policy.spec import PolicySpec
from kvprune.policy.trained import TrainedPolicy
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
        left_out: names of the other built-in policies that drop something, and why each is left out. Those
            without options, such as ``full``, are the same at every budget and are not listed.
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
        if entry.distribution != _OWN or not types:
            continue
        required = required_options(entry.cls)
        if entry.cls.reads_answer:
            left_out[name] = f"is a {REFERENCE}: it reads the full cache's answer"
            continue
        if required:
            left_out[name] = f"needs {', '.join(required)}; add it with --policy"
            continue
        if "keep_ratio" not in types:
            left_out[name] = _without_ratio(found, name, adapter)
            continue
        options = {"reach": "onward"} if "onward" in typing.get_args(types.get("reach")) else {}
        spec = PolicySpec(name, options)
        if why := _missing(_with_ratio(found, spec), adapter):
            left_out[name] = why
            continue
        specs.append(str(spec))
    return Everything(tuple(specs), left_out)


def _with_ratio(installed: Registry, spec: PolicySpec) -> CrossKVPolicy:
    return installed.get_policy(replace(spec, options={**spec.options, "keep_ratio": 0.5}))


def _missing(policy: CrossKVPolicy, adapter: type[ModelAdapter] | None) -> str:
    """Return what a policy needs and an adapter does not provide, as a reason; "" if that is nothing."""
    missing = [] if adapter is None else sorted(policy.needs - adapter.provides)
    if adapter is None or not missing:
        return ""
    return f"needs {', '.join(missing)}, which the {adapter.family} adapter does not provide"


def _without_ratio(installed: Registry, name: str, adapter: type[ModelAdapter] | None) -> str:
    """Return why a policy without a ``keep_ratio`` is left out, and how to add it with a budget of its own.

    The example is its spec; or, where all options have their defaults, those that are numbers.
    """
    policy = installed.get_policy(name)
    if why := _missing(policy, adapter):
        return why
    weights = next((part for part in parts(policy) if isinstance(part, TrainedPolicy)), None)
    options = {option: value for option, value in policy.spec.options.items() if option != "digest"}
    numbers = {option: value for option, value in policy.option_values.items() if type(value) in (int, float)}
    example = shlex.quote(str(PolicySpec(name, options or numbers)))
    said = f"has no keep_ratio; add it with a budget of its own, such as --policy {example}"
    if weights is not None and weights.trained_for:
        said += f" (its weights {weights.weights} fit one model; docs/train.md)"
    return said
