"""Broken policies. The conformance suite must catch each by the ids in its ``caught_by``.

``ALL`` lists them. A new check starts with a policy here that no other check catches.
"""

from __future__ import annotations

import importlib
import inspect

from kvprune import CrossKVPolicy

MODULES = (
    "shape",
    "budget",
    "groups",
    "padding",
    "answers",
    "keep_all",
    "layers",
    "inputs",
    "memory",
    "randomness",
    "batch",
    "leftovers",
    "monotone",
    "merging",
    "options",
    "texts",
    "runs",
    "steps",
)


def _all() -> list[type[CrossKVPolicy]]:
    found = []
    for name in MODULES:
        module = importlib.import_module(f"zoo.{name}")
        found += [
            cls
            for cls in vars(module).values()
            if inspect.isclass(cls) and cls.__module__ == module.__name__ and hasattr(cls, "caught_by")
        ]
    return found


ALL = _all()
