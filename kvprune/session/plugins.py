"""Finds the installed plugins and loads each one separately, so that a broken plugin affects no other.

A plugin is foreign code that runs when it is imported and when its hooks are called. Everything it raises or
returns is checked here. Its side effects (files, the environment, patches) cannot be undone. One kind is
found and refused: hooks on all modules of torch, because they would change the numbers of every policy.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import pluggy
from torch.nn.modules import module as torch_module

from kvprune.adapters.base import ModelAdapter
from kvprune.errors import NameClashError, PluginError
from kvprune.policy.base import CrossKVPolicy, require_policy_class
from kvprune.policy.declarations import NEEDS
from kvprune.session import hookspecs
from kvprune.session.contrast_rules import CombineRule, require_rule_class
from kvprune.session.installed import distribution_of, installed
from kvprune.text import error_line, printable, shown, suggestion

__all__ = [
    "ENTRY_POINT_GROUP",
    "PLUGINS_VARIABLE",
    "AdapterEntry",
    "BrokenPlugin",
    "PolicyEntry",
    "Provided",
    "RuleEntry",
    "distribution_of",
    "find",
    "global_hooks",
    "load_plugin",
]

ENTRY_POINT_GROUP = "kvprune"
PLUGINS_VARIABLE = "KVPRUNE_PLUGINS"

_HOOKS = "kvprune_policies", "kvprune_adapters", "kvprune_combine_rules"
_NONE = f"neither {' nor '.join(_HOOKS)}"

_MOST_CLASSES = 1000
"""Most classes that one hook may return; a hook that returns more is taken for an endless generator."""

_REFERENCE = re.compile(r"[\w.]+(\s*:\s*[\w.]+)?(\s*\[.*\])?\s*")


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
class RuleEntry:
    """A rule of `kvprune.contrast` and where it comes from."""

    name: str
    cls: type[CombineRule]
    plugin: str
    distribution: str


@dataclass(frozen=True)
class BrokenPlugin:
    """A plugin that failed to load, and its error."""

    name: str
    distribution: str
    error: BaseException

    @property
    def problem(self) -> str:
        """The error as one printable line."""
        return error_line(self.error)


def find() -> tuple[list[metadata.EntryPoint], list[BrokenPlugin]]:
    """Return the entry points to load, sorted by name, and the distributions that cannot be read.

    Raises:
        NameClashError: If two distributions provide an entry point of the same name.
        PluginError: If ``KVPRUNE_PLUGINS`` names one that is not installed.
    """
    installed, unreadable = _installed()
    found: dict[str, list[metadata.EntryPoint]] = {}
    for entry_point in installed:
        found.setdefault(entry_point.name, []).append(entry_point)
    wanted = os.environ.get(PLUGINS_VARIABLE)
    names = sorted(found) if wanted is None else [name.strip() for name in wanted.split(",") if name.strip()]
    for name in names:
        if name not in found:
            raise PluginError(
                f"{PLUGINS_VARIABLE}={shown(wanted)} names the plugin {shown(name)}, which is not installed"
                f"{suggestion(name, found)} (installed: {printable(', '.join(sorted(found))) or 'none'})"
            )
        # The same distribution may be on sys.path twice, but two distributions must not share a name.
        owners = sorted({distribution_of(entry_point) for entry_point in found[name]})
        if len(owners) > 1:
            raise NameClashError(
                f"plugin {shown(name)} is provided by {' and by '.join(owners)}; uninstall one"
            )
    return [found[name][0] for name in sorted(set(names))], unreadable if wanted is None else []


def _installed() -> tuple[list[metadata.EntryPoint], list[BrokenPlugin]]:
    """Return our entry points, and the distributions whose entry points cannot be read."""
    found, unreadable = installed(ENTRY_POINT_GROUP)
    broken = []
    for one in unreadable:
        problem = PluginError(f"the entry points under {one.path} cannot be read: {error_line(one.error)}")
        problem.__cause__ = one.error
        broken.append(BrokenPlugin(one.name, one.name, problem))
    return found, broken


@dataclass(frozen=True)
class Provided:
    """What one plugin provides."""

    policies: list[PolicyEntry]
    adapters: list[AdapterEntry]
    rules: list[RuleEntry]


def load_plugin(entry_point: metadata.EntryPoint) -> Provided:
    """Import one plugin, call its hooks, and check everything that they return.

    Raises:
        PluginError: If the plugin misuses the hooks, or leaves hooks on all modules of torch.
        BaseException: Any error of the plugin's own code.
    """
    name, distribution = printable(entry_point.name), distribution_of(entry_point)
    before = dict(global_hooks())
    reference = getattr(entry_point, "value", "")
    if reference and not _REFERENCE.fullmatch(reference):
        raise PluginError(
            f"the entry point {shown(entry_point.name)} is {shown(reference)}; "
            "expected module or module:attribute"
        )
    plugin = entry_point.load()
    # One manager per plugin: older pluggy may leave a failed plugin half registered.
    manager = pluggy.PluginManager("kvprune")
    manager.add_hookspecs(hookspecs)
    _register(manager, plugin, name)
    policies: dict[str, PolicyEntry] = {}
    for cls in _call(manager, plugin, name, "kvprune_policies", CrossKVPolicy):
        require_policy_class(cls)
        cls.check_class()
        entry = PolicyEntry(cls.name, cls, name, distribution, cls.version)
        if entry.name in policies:
            raise PluginError(
                f"plugin {name!r} provides two policies of the name {entry.name!r}: "
                f"{policies[entry.name].cls.__qualname__} and {cls.__qualname__}; rename one"
            )
        policies[entry.name] = entry
    adapters = []
    for cls in _call(manager, plugin, name, "kvprune_adapters", ModelAdapter):
        _check_adapter(cls)
        adapters.append(AdapterEntry(cls, name, distribution))
    rules = []
    for cls in _call(manager, plugin, name, "kvprune_combine_rules", CombineRule):
        require_rule_class(cls)
        rules.append(RuleEntry(cls.name, cls, name, distribution))
    _refuse_global_hooks(name, reference, before)
    return Provided(list(policies.values()), adapters, rules)


def _register(manager: pluggy.PluginManager, plugin: Any, name: str) -> None:
    """Register a plugin; raise PluginError if it implements an unknown hook, or none."""
    manager.register(plugin, name=name)
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(
            f"{error}; the hooks are kvprune_policies and kvprune_adapters, and kvprune_combine_rules for "
            "rules of kvprune.contrast, decorated with kvprune.hookimpl"
        ) from error
    if not manager.get_hookcallers(plugin):
        # A function of the right name without the decorator is the usual reason.
        bare = [hook for hook in _HOOKS if hasattr(plugin, hook)]
        hint = f"; decorate {bare[0]} with @kvprune.hookimpl" if bare else ""
        raise PluginError(f"plugin {name!r} implements {_NONE}{hint}")


def _call(
    manager: pluggy.PluginManager, plugin: Any, name: str, hook: str, base: type[Any]
) -> list[type[Any]]:
    """Call one hook of the plugin, check that it returns classes derived from ``base``, and return these."""
    where = f"hook {hook} of plugin {name!r}"
    results = getattr(manager.hook, hook)()
    implemented = {one.name for one in manager.get_hookcallers(plugin) or []}
    if hook in implemented and not results:  # pluggy drops a returned None
        raise PluginError(f"{where} returned None, expected a list of classes")
    classes: list[type[Any]] = []
    for returned in results:
        try:
            if isinstance(returned, str | bytes):
                raise TypeError
            iterator = iter(returned)
        except TypeError:
            raise PluginError(f"{where} returned {shown(returned)}, expected a list of classes") from None
        for cls in iterator:
            if not isinstance(cls, type) or not issubclass(cls, base):
                raise PluginError(
                    f"{where} returned {shown(cls)}, expected classes derived from {base.__name__}"
                )
            classes.append(cls)
            if len(classes) > _MOST_CLASSES:
                raise PluginError(f"{where} returned more than {_MOST_CLASSES} classes; does it ever end?")
    return classes


def _check_adapter(cls: type[ModelAdapter]) -> None:
    """Raise TypeError unless the class is a concrete adapter that names its family and model classes."""
    where = f"{cls.__module__}.{cls.__qualname__}"
    if inspect.isabstract(cls):
        raise TypeError(
            f"{where} is abstract: it does not define {', '.join(sorted(cls.__abstractmethods__))}"
        )
    family = getattr(cls, "family", None)
    if not isinstance(family, str) or not family:
        raise TypeError(f'{where} has the family {shown(family)}; write `family = "..."`')
    classes = getattr(cls, "model_classes", None)
    # A string must not pass for a tuple: `in` would then match substrings.
    if not isinstance(classes, tuple) or not classes or not all(isinstance(one, str) for one in classes):
        raise TypeError(
            f"{where} has the model_classes {shown(classes)}; write a tuple of class names, "
            'such as ("MllamaModel",)'
        )
    provides = getattr(cls, "provides", None)
    if not isinstance(provides, frozenset | set) or not all(need in NEEDS for need in provides):
        hint = next((suggestion(need, NEEDS) for need in _listed(provides) if need not in NEEDS), "")
        raise TypeError(
            f"{where} provides {shown(provides)}; write a frozenset of some of "
            f"{', '.join(map(repr, NEEDS))}{hint}"
        )


def _listed(value: object) -> list[Any]:
    """Return what is in a collection, or the value itself, for a suggestion."""
    return list(value) if isinstance(value, frozenset | set | list | tuple) else [value]


def global_hooks() -> Iterator[tuple[tuple[str, int], object]]:
    """Yield ``((table, key), hook)`` for each hook that torch runs for every module of every model."""
    for table, hooks in vars(torch_module).items():
        if table.startswith("_global_") and table.endswith("_hooks") and isinstance(hooks, dict):
            for key, hook in hooks.items():
                yield (table, key), hook


def _refuse_global_hooks(name: str, reference: str, before: dict[tuple[str, int], object]) -> None:
    """Raise if the plugin put a hook on all modules of torch, now or when it was first imported."""
    module = reference.partition(":")[0].strip()
    package = module.rpartition(".")[0] or module
    left = [
        f"{table.removeprefix('_global_').removesuffix('_hooks')} hook {shown(hook, 80)}"
        for (table, key), hook in global_hooks()
        # When the plugin was imported earlier, its hook is already there; its module tells whose it is.
        if (table, key) not in before or (package and f"{_module_of(hook)}.".startswith(f"{package}."))
    ]
    if left:
        raise PluginError(
            f"plugin {name!r} leaves hooks on all modules of torch behind: {', '.join(left)}; they change "
            f"every model in this process, so remove them, or leave the plugin out with {PLUGINS_VARIABLE}"
        )


def _module_of(hook: object) -> str:
    """Return the module that defines a hook, or the function inside a partial."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "") or "")
