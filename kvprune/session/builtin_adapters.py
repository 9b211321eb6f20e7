"""The plugin that provides the built-in adapters, through the hook that third-party packages use."""

from __future__ import annotations

from kvprune.adapters.base import ModelAdapter
from kvprune.adapters.families import FAMILIES
from kvprune.adapters.mllama import MllamaAdapter
from kvprune.session.hookspecs import hookimpl

__all__ = ["kvprune_adapters"]


@hookimpl
def kvprune_adapters() -> list[type[ModelAdapter]]:
    """Return the adapters that ship with kvprune."""
    return [MllamaAdapter, *FAMILIES]
