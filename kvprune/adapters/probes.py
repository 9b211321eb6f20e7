"""Probes: what adapters rely on in the installed transformers, and whether it holds."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers.cache_utils import DynamicCache, DynamicLayer

__all__ = ["Probe", "probe_cache", "probe_signatures"]


@dataclass(frozen=True)
class Probe:
    """One thing that an adapter relies on in the installed transformers, and whether it holds."""

    name: str
    ok: bool
    detail: str


def probe_signatures(module_name: str, wanted: Mapping[str, Sequence[str]]) -> list[Probe]:
    """Check that a module has classes whose ``forward`` takes the parameters that hooks read or replace.

    Args:
        module_name: Dotted name of a modeling file of transformers.
        wanted: Parameters of ``forward`` by class name; "new|old" is one of several names.
    """
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        return [Probe(module_name, False, f"cannot be imported ({error})")]
    probes = []
    for name, parameters in wanted.items():
        found = getattr(module, name, None)
        if found is None:
            probes.append(Probe(name, False, f"is gone from {module_name}"))
            continue
        known = inspect.signature(inspect.unwrap(found.forward)).parameters.keys()
        missing = [parameter for parameter in parameters if not known & set(parameter.split("|"))]
        detail = (
            f"forward lacks {', '.join(missing)}" if missing else f"forward takes {', '.join(parameters)}"
        )
        probes.append(Probe(name, not missing, detail))
    return probes


def probe_cache() -> Probe:
    """Check that the default cache is made of layers whose place ours can take."""
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
