"""The plugin hooks: how a package adds policies, model adapters, and rules of `kvprune.contrast`.

The built-in policies and adapters use them, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from kvprune.adapters.base import ModelAdapter
    from kvprune.policy.base import CrossKVPolicy
    from kvprune.session.contrast_rules import CombineRule

__all__ = ["hookimpl", "hookspec"]

hookspec = pluggy.HookspecMarker("kvprune")
hookimpl = pluggy.HookimplMarker("kvprune")


@hookspec
def kvprune_policies() -> Iterable[type[CrossKVPolicy]]:  # type: ignore[empty-body]
    """Return the policy classes that a plugin provides."""


@hookspec
def kvprune_adapters() -> Iterable[type[ModelAdapter]]:  # type: ignore[empty-body]
    """Return the adapter classes that a plugin provides."""


@hookspec
def kvprune_combine_rules() -> Iterable[type[CombineRule]]:  # type: ignore[empty-body]
    """Return the rules that a plugin provides: classes derived from `kvprune.CombineRule`."""
