"""Names: what the installed plugins provide, and how a spec becomes a policy.

A plugin that breaks is remembered and reported, and raises only when something of it is asked for.
Nothing is cached here, so what is installed is what is seen.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from kvprune.adapters.base import ModelAdapter
from kvprune.errors import (
    KVPruneError,
    NameClashError,
    PluginError,
    PolicyOptionError,
    SpecError,
    UnknownPolicyError,
    UnsupportedModelError,
)
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.nesting import make_nested
from kvprune.policy.spec import PolicySpec
from kvprune.session.plugins import (
    ENTRY_POINT_GROUP,
    PLUGINS_VARIABLE,
    AdapterEntry,
    BrokenPlugin,
    PolicyEntry,
    distribution_of,
    find,
    load_plugin,
)
from kvprune.text import error_line, printable, shown, suggestion

__all__ = [
    "ENTRY_POINT_GROUP",
    "PLUGINS_VARIABLE",
    "AdapterEntry",
    "BrokenPlugin",
    "PolicyEntry",
    "Registry",
    "find_adapter",
    "get_policy",
    "list_policies",
    "load",
]


@dataclass(frozen=True)
class Registry:
    """What the installed plugins provide."""

    policies: Mapping[str, PolicyEntry]
    adapters: tuple[AdapterEntry, ...]
    broken: tuple[BrokenPlugin, ...]

    def policy_class(self, name: str) -> type[CrossKVPolicy]:
        """Return the policy class of a name.

        Raises:
            PluginError: If the name is that of a broken plugin, with its error as the cause.
            UnknownPolicyError: If no plugin provides it; lists the names and the closest one.
        """
        if isinstance(name, str) and name in self.policies:
            return self.policies[name].cls
        for plugin in self.broken:
            if name in (plugin.name, plugin.distribution):
                raise PluginError(
                    f"plugin {plugin.name!r} of {plugin.distribution} is broken: {plugin.problem}"
                ) from plugin.error
        names = ", ".join(self.policies) or "none"
        message = f"unknown policy {shown(name)}{suggestion(name, self.policies)} (installed: {names})"
        if self.broken:
            message += f" (broken plugins, see `kvprune list`: {', '.join(p.name for p in self.broken)})"
        if not self.policies:
            message += (
                "; no plugin was found: install the project (pip install -e .) "
                f"and check the variable {PLUGINS_VARIABLE}={shown(os.environ.get(PLUGINS_VARIABLE))}"
            )
        raise UnknownPolicyError(message)

    def get_policy(self, spec: str | PolicySpec | CrossKVPolicy) -> CrossKVPolicy:
        """Turn a spec into a policy, those in its options first; a policy is returned as it is.

        Raises:
            SpecError: If the text is no spec, or the spec demands another version than is installed.
            UnknownPolicyError, PluginError: See `policy_class`.
            PolicyOptionError: If an option is unknown or a value is wrong, or a policy of another kind than
                the option takes.
            PluginError: If the policy's own code fails while it is built.
        """
        if isinstance(spec, CrossKVPolicy):
            return spec
        if isinstance(spec, str):
            spec = PolicySpec.parse(spec)
        if not isinstance(spec, PolicySpec):
            raise SpecError(f"expected a spec string, a PolicySpec or a policy, got {shown(spec)}")
        cls = self.policy_class(spec.name)
        entry = self.policies[spec.name]
        if spec.version not in (None, entry.version):
            raise SpecError(
                f"the spec asks for version {spec.version} of policy {spec.name!r}, "
                f"but version {entry.version} is installed; its selections may differ"
            )
        where, text = f"policy {spec.name!r} of plugin {entry.plugin!r}", shown(str(spec))
        try:
            classes = {name: entry.cls for name, entry in self.policies.items()}
            policy = cls.from_options(make_nested(cls, spec.options, self.get_policy, classes))
        except (KVPruneError, KeyboardInterrupt):
            raise
        except ValueError as error:  # how authors who do not know our errors refuse a value
            raise PolicyOptionError(f"{where} refuses {text}: {error_line(error)}") from error
        except BaseException as error:
            raise PluginError(f"{where} cannot be built from {text}: {error_line(error)}") from error
        if not isinstance(policy, CrossKVPolicy):
            raise PluginError(f"{where} built {shown(policy)} from {text}, which is no policy")
        return policy

    def adapter_for(self, model: object) -> type[ModelAdapter]:
        """Return the adapter class for a model.

        Raises:
            UnsupportedModelError: If none matches (lists what is supported), or several do.
            PluginError: If none matches, and an adapter failed at the question.
        """
        matching: list[AdapterEntry] = []
        failed: list[tuple[AdapterEntry, BaseException]] = []
        for entry in self.adapters:
            try:
                if entry.cls.matches(model):
                    matching.append(entry)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # foreign code; others may still know the model
                failed.append((entry, error))
        kind = type(model).__name__
        if len(matching) == 1:
            return matching[0].cls
        if matching:
            claims = ", ".join(f"{entry.cls.__name__} of plugin {entry.plugin!r}" for entry in matching)
            raise UnsupportedModelError(f"{kind} is claimed by several adapters: {claims}")
        names = sorted({name for entry in self.adapters for name in entry.cls.model_classes})
        message = (
            f"no adapter supports {kind}; "
            f"supported: {printable(', '.join(names)) or 'nothing (no plugin provides an adapter)'}"
        )
        if failed:
            problems = ", ".join(
                f"{entry.cls.__name__} of plugin {entry.plugin!r} failed at {kind}: {error_line(error)}"
                for entry, error in failed
            )
            raise PluginError(f"{message}; {problems}") from failed[0][1]
        if self.broken:
            message += f" (broken plugins, see `kvprune list`: {', '.join(p.name for p in self.broken)})"
        raise UnsupportedModelError(message)


def list_policies() -> list[str]:
    """Return the sorted names of all installed policies, built-in and third-party alike."""
    return sorted(load().policies)


def get_policy(spec: str | PolicySpec | CrossKVPolicy) -> CrossKVPolicy:
    """Turn a spec such as ``"trim:k_ratio=0.25"`` into a policy (see `Registry.get_policy`)."""
    return spec if isinstance(spec, CrossKVPolicy) else load().get_policy(spec)


def find_adapter(model: object) -> type[ModelAdapter]:
    """Return the adapter class for a model (see `Registry.adapter_for`)."""
    return load().adapter_for(model)


def load() -> Registry:
    """Find, import and register all plugins, each on its own.

    The environment variable ``KVPRUNE_PLUGINS`` restricts this to the named entry points, separated by
    commas; empty means none, unset means all.

    Raises:
        NameClashError: If two distributions provide a plugin, or two plugins a policy, of one name.
        PluginError: If the variable names a plugin that is not installed.
    """
    entry_points, broken = find()
    policies: dict[str, PolicyEntry] = {}
    adapters: list[AdapterEntry] = []
    for entry_point in entry_points:
        try:
            found, found_adapters = load_plugin(entry_point)
            _refuse_the_same_again(found, policies)
        except KeyboardInterrupt:  # the user's, not the plugin's
            raise
        # Foreign code: whatever it raises, SystemExit too, is its own affair until it is asked for.
        except BaseException as error:
            broken.append(BrokenPlugin(printable(entry_point.name), distribution_of(entry_point), error))
            continue
        for entry in found:
            if entry.name in policies:
                other = policies[entry.name]
                raise NameClashError(
                    f"policy {entry.name!r} is provided by plugin {other.plugin!r} of "
                    f"{other.distribution} and by {entry.plugin!r} of {entry.distribution}; "
                    f"rename one, uninstall one, or restrict {PLUGINS_VARIABLE}"
                )
            policies[entry.name] = entry
        adapters += found_adapters
    ordered = MappingProxyType(dict(sorted(policies.items())))
    return Registry(ordered, tuple(adapters), tuple(broken))


def _refuse_the_same_again(found: list[PolicyEntry], policies: Mapping[str, PolicyEntry]) -> None:
    """Raise if a plugin provides a class that another already did: one module under two names."""
    for entry in found:
        if entry.name in policies and policies[entry.name].cls is entry.cls:
            raise PluginError(
                f"plugin {entry.plugin!r} provides the class {entry.cls.__qualname__}, which plugin "
                f"{policies[entry.name].plugin!r} already provides; remove one of the entry points"
            )
