"""Which entry points are installed, and of which distributions: read once, until something is installed.

`importlib.metadata` reads the files of every installed distribution each time. That takes milliseconds, and
every policy that is named by text and every model that is compressed would ask again.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, field
from importlib import metadata
from importlib.machinery import PathFinder
from typing import Any

from kvprune.text import printable

__all__ = ["Unreadable", "distribution_of", "installed"]


@dataclass(frozen=True)
class Unreadable:
    """A distribution whose entry points cannot be read, where it is, and the error."""

    name: str
    path: object
    error: Exception


@dataclass(frozen=True)
class _Reading:
    """What was read, and what Python would search then."""

    stamp: tuple[Any, ...]
    entry_points: tuple[metadata.EntryPoint, ...]
    owners: dict[int, tuple[metadata.EntryPoint, str]] = field(default_factory=dict)


_last: _Reading | None = None


def installed(group: str) -> tuple[list[metadata.EntryPoint], list[Unreadable]]:
    """Return the entry points of a group, and the distributions whose entry points cannot be read."""
    global _last
    stamp = _stamp(group)
    last = _last
    if last is not None and stamp is not None and last.stamp == stamp:
        return list(last.entry_points), []
    try:
        found = tuple(metadata.entry_points(group=group))
    except Exception:  # a single damaged distribution makes this raise, so look at each one
        return _one_by_one(group)
    _last = None if stamp is None else _Reading(stamp, found)
    return list(found), []


def _stamp(group: str) -> tuple[Any, ...] | None:
    """Return what changes when a distribution is installed or removed; None if that cannot be told.

    It changes with each folder of ``sys.path`` in which something is added or removed, and with the path.
    """
    finders = [finder for finder in sys.meta_path if hasattr(finder, "find_distributions")]
    if finders != [PathFinder]:  # others may find distributions anywhere
        return None
    return group, metadata.entry_points, *(_state(folder) for folder in sys.path)


def _state(folder: str) -> tuple[Any, ...]:
    try:
        found = os.stat(folder or ".")
    except (OSError, TypeError, ValueError):
        return (folder,)
    return folder, found.st_dev, found.st_ino, found.st_mtime_ns


def _one_by_one(group: str) -> tuple[list[metadata.EntryPoint], list[Unreadable]]:
    found: list[metadata.EntryPoint] = []
    unreadable: list[Unreadable] = []
    seen: set[str] = set()
    for distribution in metadata.distributions():
        path = getattr(distribution, "_path", None)
        name = printable(str(getattr(path, "name", "a distribution without a path")))
        try:
            name = distribution.name or name
            key = re.sub("[-_.]+", "-", name).lower()
            if key not in seen:  # the first on sys.path is the one that is imported
                seen.add(key)
                found += [one for one in distribution.entry_points if one.group == group]
        except Exception as error:
            unreadable.append(Unreadable(printable(name), path, error))
    return found, unreadable


def distribution_of(entry_point: metadata.EntryPoint) -> str:
    """Return the name of an entry point's distribution, or "an unknown distribution"."""
    owners = {} if _last is None else _last.owners
    known = owners.get(id(entry_point))
    if known is not None and known[0] is entry_point:
        return known[1]
    try:
        name = entry_point.dist.name if entry_point.dist is not None else None
    except Exception:  # damaged metadata
        name = None
    owner = printable(name) if name else "an unknown distribution"
    if _last is not None and any(entry_point is one for one in _last.entry_points):
        owners[id(entry_point)] = entry_point, owner
    return owner
