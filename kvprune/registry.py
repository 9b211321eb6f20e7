"""Names: which plugins are installed, what they provide, and how a spec becomes a policy.

Plugins are entry points of the group ``kvprune``. Each is loaded on its own: one that breaks is remembered
and reported, and raises only when something of it is asked for. Nothing is cached here, so what is
installed is what is seen.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from types import MappingProxyType
from typing import Any

import pluggy

from kvprune import hookspecs
from kvprune.adapters.base import ModelAdapter
from kvprune.errors import (
    NameClashError,
    PluginError,
    SpecError,
    UnknownPolicyError,
    UnsupportedModelError,
)
from kvprune.policy import CrossKVPolicy
from kvprune.spec import PolicySpec, suggestion

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

ENTRY_POINT_GROUP = "kvprune"
PLUGINS_VARIABLE = "KVPRUNE_PLUGINS"


@dataclass(frozen=True)
class PolicyEntry:
    """A policy class and where it comes from."""

    name: str
    cls: type[CrossKVPolicy]
    plugin: str
    distribution: str
    version: int


@dataclass(frozen=True)
class AdapterEntry:
    """An adapter class and where it comes from."""

    cls: type[ModelAdapter]
    plugin: str
    distribution: str


@dataclass(frozen=True)
class BrokenPlugin:
    """A plugin that could not be used, and why."""

    name: str
    distribution: str
    error: BaseException


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
        if name in self.policies:
            return self.policies[name].cls
        for plugin in self.broken:
            if plugin.name == name or plugin.distribution == name:
                raise PluginError(
                    f"plugin {plugin.name!r} of {plugin.distribution} is broken: {plugin.error!r}"
                ) from plugin.error
        names = ", ".join(self.policies) or "none"
        message = f"unknown policy {name!r}{suggestion(name, self.policies)} (installed: {names})"
        if self.broken:
            message += f" (broken plugins, see `kvprune list`: {', '.join(p.name for p in self.broken)})"
        if not self.policies:
            message += (
                "; no plugin was found: install the project (pip install -e .) "
                f"and check the variable {PLUGINS_VARIABLE}={os.environ.get(PLUGINS_VARIABLE)!r}"
            )
        raise UnknownPolicyError(message)

    def get_policy(self, spec: str | PolicySpec | CrossKVPolicy) -> CrossKVPolicy:
        """Turn a spec into a policy; a policy is returned as it is.

        Raises:
            SpecError: If the text is no spec, or the spec demands another version than is installed.
            UnknownPolicyError, PluginError: See `policy_class`.
            PolicyOptionError: If an option is unknown or a value is wrong.
        """
        if isinstance(spec, CrossKVPolicy):
            return spec
        if isinstance(spec, str):
            spec = PolicySpec.parse(spec)
        if not isinstance(spec, PolicySpec):
            raise SpecError(f"expected a spec string, a PolicySpec or a policy, got {spec!r}")
        cls = self.policy_class(spec.name)
        if spec.version not in (None, cls.version):
            raise SpecError(
                f"the spec asks for version {spec.version} of policy {spec.name!r}, "
                f"but version {cls.version} is installed; its selections may differ"
            )
        return cls.from_options(spec.options)

    def adapter_for(self, model: object) -> type[ModelAdapter]:
        """Return the adapter class for a model.

        Raises:
            UnsupportedModelError: If none matches (lists what is supported), or several do.
        """
        matching = [entry for entry in self.adapters if entry.cls.matches(model)]
        if not matching:
            names = sorted({name for entry in self.adapters for name in entry.cls.model_classes})
            raise UnsupportedModelError(
                f"no adapter supports {type(model).__name__}; "
                f"supported: {', '.join(names) or 'nothing (no plugin provides an adapter)'}"
            )
        if len(matching) > 1:
            claims = ", ".join(f"{entry.cls.__name__} of plugin {entry.plugin!r}" for entry in matching)
            raise UnsupportedModelError(f"{type(model).__name__} is claimed by several adapters: {claims}")
        return matching[0].cls


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
    manager = pluggy.PluginManager("kvprune")
    manager.add_hookspecs(hookspecs)
    policies: dict[str, PolicyEntry] = {}
    adapters: list[AdapterEntry] = []
    broken: list[BrokenPlugin] = []
    for entry_point in _entry_points():
        distribution = _distribution(entry_point)
        try:
            plugin = entry_point.load()
            _register(manager, plugin, entry_point.name)
            found = _call(manager, plugin, entry_point.name, "kvprune_policies", CrossKVPolicy)
            for cls in found:
                cls.check_class()
            adapter_classes = _call(manager, plugin, entry_point.name, "kvprune_adapters", ModelAdapter)
        # A plugin is foreign code: whatever it raises is its own affair until it is asked for.
        except Exception as error:
            broken.append(BrokenPlugin(entry_point.name, distribution, error))
            continue
        for cls in found:
            if cls.name in policies:
                raise NameClashError(
                    f"policy {cls.name!r} is provided by plugin {policies[cls.name].plugin!r} of "
                    f"{policies[cls.name].distribution} and by {entry_point.name!r} of {distribution}; "
                    f"rename one, uninstall one, or restrict {PLUGINS_VARIABLE}"
                )
            policies[cls.name] = PolicyEntry(cls.name, cls, entry_point.name, distribution, cls.version)
        adapters += [AdapterEntry(cls, entry_point.name, distribution) for cls in adapter_classes]
    ordered = MappingProxyType(dict(sorted(policies.items())))
    return Registry(ordered, tuple(adapters), tuple(broken))


def _entry_points() -> list[metadata.EntryPoint]:
    """Return the entry points that may load, in the order of their names."""
    found: dict[str, list[metadata.EntryPoint]] = {}
    for entry_point in metadata.entry_points(group=ENTRY_POINT_GROUP):
        found.setdefault(entry_point.name, []).append(entry_point)
    wanted = os.environ.get(PLUGINS_VARIABLE)
    names = sorted(found) if wanted is None else [name.strip() for name in wanted.split(",") if name.strip()]
    for name in names:
        if name not in found:
            raise PluginError(
                f"{PLUGINS_VARIABLE}={wanted!r} names the plugin {name!r}, which is not installed"
                f"{suggestion(name, found)} (installed: {', '.join(sorted(found)) or 'none'})"
            )
        # One distribution may be listed twice on sys.path; two distributions must not share a name.
        owners = sorted({_distribution(entry_point) for entry_point in found[name]})
        if len(owners) > 1:
            raise NameClashError(f"plugin {name!r} is provided by {' and by '.join(owners)}; uninstall one")
    return [found[name][0] for name in sorted(set(names))]


def _distribution(entry_point: metadata.EntryPoint) -> str:
    return entry_point.dist.name if entry_point.dist is not None else "an unknown distribution"


def _register(manager: pluggy.PluginManager, plugin: Any, name: str) -> None:
    """Register a plugin, refusing hooks that we do not have."""
    manager.register(plugin, name=name)
    try:
        manager.check_pending()
        implemented = {caller.name for caller in manager.get_hookcallers(plugin) or []}
    except pluggy.PluginValidationError as error:
        manager.unregister(plugin)
        raise PluginError(
            f"{error}; the hooks are kvprune_policies and kvprune_adapters, decorated with kvprune.hookimpl"
        ) from error
    if not implemented:
        manager.unregister(plugin)
        # A function of the right name without the decorator is the usual reason.
        bare = [hook for hook in ("kvprune_policies", "kvprune_adapters") if hasattr(plugin, hook)]
        hint = f"; decorate {bare[0]} with @kvprune.hookimpl" if bare else ""
        raise PluginError(f"plugin {name!r} implements neither kvprune_policies nor kvprune_adapters{hint}")


def _call(
    manager: pluggy.PluginManager, plugin: Any, name: str, hook: str, base: type[Any]
) -> list[type[Any]]:
    """Call one hook of one plugin alone, so that provenance is known, and check what it returns."""
    others = [other for other in manager.get_plugins() if other is not plugin]
    caller: Callable[[], list[Any]] = manager.subset_hook_caller(hook, others)
    classes: list[type[Any]] = []
    results = caller()
    implemented = {one.name for one in manager.get_hookcallers(plugin) or []}
    if hook in implemented and not results:  # pluggy leaves None out
        raise PluginError(f"hook {hook} of plugin {name!r} returned None, expected a list of classes")
    for returned in results:
        for cls in returned:
            if not isinstance(cls, type) or not issubclass(cls, base):
                raise PluginError(
                    f"hook {hook} of plugin {name!r} returned {cls!r}, "
                    f"expected classes derived from {base.__name__}"
                )
            classes.append(cls)
    return classes
