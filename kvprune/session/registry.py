"""The registry: which policies and adapters the installed plugins provide, and how a spec becomes a policy.

A plugin that fails to load is remembered and reported; its error is raised only when something of that plugin
is asked for. Nothing is cached, so a plugin that is installed later is found without a restart.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from kvprune.adapters.base import ModelAdapter
from kvprune.adapters.refused import why_refused
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
from kvprune.session.contrast_rules import RULES
from kvprune.session.plugins import (
    ENTRY_POINT_GROUP,
    PLUGINS_VARIABLE,
    AdapterEntry,
    BrokenPlugin,
    PolicyEntry,
    RuleEntry,
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
    "ResolvedPolicy",
    "RuleEntry",
    "find_adapter",
    "get_policy",
    "list_policies",
    "load",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedPolicy:
    """A policy and where it comes from.

    Attributes:
        policy: The policy, with all its options.
        cls: Its class.
        version: Version of the class.
        plugin: Entry point that provides the class; empty if no installed plugin does.
        distribution: Installed distribution of that entry point, or empty.
    """

    policy: CrossKVPolicy
    cls: type[CrossKVPolicy]
    version: int
    plugin: str
    distribution: str


@dataclass(frozen=True)
class Registry:
    """What the installed plugins provide.

    Attributes:
        policies: Policy classes with their origin, by name.
        adapters: Adapter classes with their origin.
        broken: Plugins that failed to load.
        rules: Rules of `kvprune.contrast` with their origin, by name.
    """

    policies: Mapping[str, PolicyEntry]
    adapters: tuple[AdapterEntry, ...]
    broken: tuple[BrokenPlugin, ...]
    rules: Mapping[str, RuleEntry] = field(default_factory=dict)

    def entry(self, name: str) -> PolicyEntry:
        """Return the policy class of a name, with its origin.

        Raises:
            PluginError: If the name is that of a broken plugin; that plugin's error is the cause.
            UnknownPolicyError: If no plugin provides it; lists the names and the closest one.
        """
        if isinstance(name, str) and name in self.policies:
            return self.policies[name]
        for plugin in self.broken:
            if name in (plugin.name, plugin.distribution):
                raise PluginError(
                    f"plugin {plugin.name!r} of {plugin.distribution} is broken: {plugin.problem}"
                ) from plugin.error
        names = ", ".join(self.policies) or "none"
        close = suggestion(name, [*self.policies, *self.rules])
        if isinstance(name, str) and name in self.rules:
            close = (
                f": it is a rule of kvprune.contrast(model, POLICY, {name!r}); in kvprune compare, write "
                f"POLICY:contrast={name}, such as trim:contrast={name}"
            )
        message = f"unknown policy {shown(name)}{close} (installed: {names})"
        message += self._broken_names()
        if not self.policies:
            message += (
                "; no plugin was found: install the project (pip install -e .) "
                f"and check the variable {PLUGINS_VARIABLE}={shown(os.environ.get(PLUGINS_VARIABLE))}"
            )
        raise UnknownPolicyError(message)

    def policy_class(self, name: str) -> type[CrossKVPolicy]:
        """Return the policy class of a name; raises what `entry` raises."""
        return self.entry(name).cls

    def resolve(self, spec: str | PolicySpec | CrossKVPolicy) -> ResolvedPolicy:
        """Turn a spec into a policy, and say where the policy comes from.

        Policies among the options are built first. A policy is returned as it is, with its origin if an
        installed plugin provides its class.

        Raises:
            SpecError: If the text is no spec, or the spec demands another version than is installed.
            UnknownPolicyError, PluginError: See `entry`.
            PolicyOptionError: If an option is unknown, a value is wrong, or an option takes another kind of
                policy than the one that it names.
            PluginError: If the policy's own code fails while it is built.
        """
        if isinstance(spec, CrossKVPolicy):
            cls = type(spec)
            # By class, not by name: a class that is not installed may have the name of one that is.
            known = next((entry for entry in self.policies.values() if entry.cls is cls), None)
            return _resolved(spec, known or PolicyEntry("", cls, "", "", cls.version))
        if isinstance(spec, str):
            spec = PolicySpec.parse(spec)
        if not isinstance(spec, PolicySpec):
            raise SpecError(f"expected a spec string, a PolicySpec or a policy, got {shown(spec)}")
        entry = self.entry(spec.name)
        if spec.version not in (None, entry.version):
            raise SpecError(
                f"the spec asks for version {spec.version} of policy {spec.name!r}, "
                f"but version {entry.version} is installed; its selections may differ"
            )
        return _resolved(self._build(entry, spec), entry)

    def get_policy(self, spec: str | PolicySpec | CrossKVPolicy) -> CrossKVPolicy:
        """Turn a spec into a policy; a policy is returned as it is. Raises what `resolve` raises."""
        return self.resolve(spec).policy

    def _build(self, entry: PolicyEntry, spec: PolicySpec) -> CrossKVPolicy:
        """Build a policy from the options of a spec; the author's code runs here and may raise anything."""
        where, text = f"policy {spec.name!r} of plugin {entry.plugin!r}", shown(str(spec))
        if "contrast" in spec.options and "contrast" not in entry.cls.option_types():
            raise PolicyOptionError(
                f"{text} names a rule of contrast, which is no option of policy {spec.name!r}: specs of "
                "kvprune compare may say so; elsewhere, call kvprune.contrast(model, POLICY, RULE)"
            )
        try:
            classes = {name: other.cls for name, other in self.policies.items()}
            options = entry.cls.with_preset(spec.options)
            policy = entry.cls.from_options(make_nested(entry.cls, options, self.get_policy, classes))
        except (KVPruneError, KeyboardInterrupt):
            raise
        except ValueError as error:  # how authors who do not know our errors refuse a value
            raise PolicyOptionError(f"{where} refuses {text}: {error_line(error)}") from error
        except BaseException as error:
            raise PluginError(f"{where} cannot be built from {text}: {error_line(error)}") from error
        if not isinstance(policy, CrossKVPolicy):
            raise PluginError(f"{where} built {shown(policy)} from {text}, which is no policy")
        return policy

    def _broken_names(self) -> str:
        """Return the names of broken plugins for the end of a message; empty if there are none."""
        names = ", ".join(plugin.name for plugin in self.broken)
        return f" (broken plugins, see `kvprune list`: {names})" if names else ""

    def adapter_for(self, model: object) -> type[ModelAdapter]:
        """Return the adapter class for a model.

        Raises:
            UnsupportedModelError: If no adapter supports the model (says why if that is known, and lists what
                is supported), or several do.
            PluginError: If no adapter supports the model, and one failed while it was asked.
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
        reason = why_refused(model)
        message = (
            f"no adapter supports {kind}{': ' * bool(reason)}{reason}; "
            f"supported: {printable(', '.join(names)) or 'nothing (no plugin provides an adapter)'}"
        )
        if failed:
            problems = ", ".join(
                f"{entry.cls.__name__} of plugin {entry.plugin!r} failed at {kind}: {error_line(error)}"
                for entry, error in failed
            )
            raise PluginError(f"{message}; {problems}") from failed[0][1]
        raise UnsupportedModelError(message + self._broken_names())


def _resolved(policy: CrossKVPolicy, entry: PolicyEntry) -> ResolvedPolicy:
    return ResolvedPolicy(
        policy=policy,
        cls=type(policy),
        version=entry.version,
        plugin=entry.plugin,
        distribution=entry.distribution,
    )


def list_policies() -> list[str]:
    """Return the sorted names of all installed policies, built-in and third-party."""
    return sorted(load().policies)


def get_policy(spec: str | PolicySpec | CrossKVPolicy) -> CrossKVPolicy:
    """Turn a spec such as ``"trim:k_ratio=0.25"`` into a policy.

    A policy is returned as it is, without loading plugins.

    Raises:
        KVPruneError: If the spec names no usable policy; see `Registry.resolve`.

    Example:
        >>> import kvprune
        >>> kvprune.get_policy("random:keep_tokens=3").keep_tokens
        3
    """
    return spec if isinstance(spec, CrossKVPolicy) else load().get_policy(spec)


def find_adapter(model: object) -> type[ModelAdapter]:
    """Return the adapter class for a model (see `Registry.adapter_for`)."""
    return load().adapter_for(model)


def load() -> Registry:
    """Find, import and register all plugins, each independently of the others.

    The environment variable ``KVPRUNE_PLUGINS`` restricts this to the entry points that it names, separated
    by commas. If it is empty, no plugin is loaded; if it is unset, all are.

    Raises:
        NameClashError: If two distributions provide plugins of the same name, or two plugins provide
            policies of the same name.
        PluginError: If the variable names a plugin that is not installed.
    """
    entry_points, broken = find()
    policies: dict[str, PolicyEntry] = {}
    adapters: list[AdapterEntry] = []
    rules = {name: RuleEntry(name, cls, "kvprune", "kvprune") for name, cls in RULES.items()}
    for entry_point in entry_points:
        try:
            provided = load_plugin(entry_point)
            found = provided.policies
            _refuse_the_same_again(found, policies)
        except KeyboardInterrupt:  # the user's, not the plugin's
            raise
        # A plugin may raise anything, even SystemExit; its error is raised when the plugin is asked for.
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
        for rule in provided.rules:
            if rule.name in rules:
                other_rule = rules[rule.name]
                raise NameClashError(
                    f"rule {rule.name!r} is provided by plugin {other_rule.plugin!r} of "
                    f"{other_rule.distribution} and by {rule.plugin!r} of {rule.distribution}; rename one, "
                    f"uninstall one, or restrict {PLUGINS_VARIABLE}"
                )
            rules[rule.name] = rule
        adapters += provided.adapters
    ordered = MappingProxyType(dict(sorted(policies.items())))
    return Registry(ordered, tuple(adapters), tuple(broken), MappingProxyType(dict(sorted(rules.items()))))


def _refuse_the_same_again(found: list[PolicyEntry], policies: Mapping[str, PolicyEntry]) -> None:
    """Raise if another plugin already provided the same class: two entry points name one module."""
    for entry in found:
        if entry.name in policies and policies[entry.name].cls is entry.cls:
            raise PluginError(
                f"plugin {entry.plugin!r} provides the class {entry.cls.__qualname__}, which plugin "
                f"{policies[entry.name].plugin!r} already provides; remove one of the entry points"
            )
