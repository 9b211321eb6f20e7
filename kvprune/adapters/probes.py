"""Probes check that the installed transformers has what adapters rely on."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers.cache_utils import DynamicCache, DynamicLayer

__all__ = ["Probe", "probe_cache", "probe_signatures"]


@dataclass(frozen=True)
class Probe:
    """Result of one check of the installed transformers.

    Args:
        name: What was checked: a class, a module or a function.
        ok: Whether it has what an adapter relies on.
        detail: What it has or lacks, for messages.
    """

    name: str
    ok: bool
    detail: str


def probe_signatures(module_name: str, wanted: Mapping[str, Sequence[str]]) -> list[Probe]:
    """Check that the ``forward`` methods of some classes take the parameters that hooks read or replace.

    Args:
        module_name: Dotted name of a modeling file of transformers.
        wanted: Parameters of ``forward`` by class name; "new|old" means any one of these names.
    """
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        return [Probe(module_name, False, f"cannot be imported ({error})")]
    probes = []
    for name, parameters in wanted.items():
        found = getattr(module, name, None)
        if found is None:
            probes.append(Probe(name, False, f"is missing from {module_name}"))
            continue
        known = inspect.signature(inspect.unwrap(found.forward)).parameters.keys()
        missing = [parameter for parameter in parameters if not known & set(parameter.split("|"))]
        detail = (
            f"forward lacks {', '.join(missing)}" if missing else f"forward takes {', '.join(parameters)}"
        )
        probes.append(Probe(name, not missing, detail))
    return probes


def probe_cache() -> Probe:
    """Check that the default cache consists of layers that kvprune can replace."""
    cache = DynamicCache()
    wanted = {
        "layers that are DynamicLayer": cache.layer_class_to_replicate is DynamicLayer,
        "the list `layers`": isinstance(cache.layers, list),
        "the flag `offloading`": hasattr(cache, "offloading"),
    }
    missing = [what for what, there in wanted.items() if not there]
    return Probe(
        "DynamicCache", not missing, f"{'lacks' if missing else 'has'} {', '.join(missing or wanted)}"
    )
