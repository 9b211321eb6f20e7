"""`check_adapter`: find the adapter to check, run the invariants of adapters, and report."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from kvprune.adapters.base import ModelAdapter
from kvprune.errors import UnknownInvariantError, UnsupportedModelError
from kvprune.session.registry import load
from kvprune.testing.conformance.adapters.invariants import ADAPTER_INVARIANTS
from kvprune.testing.conformance.adapters.runner import AdapterRunner, MakeInputs, MakeModel
from kvprune.testing.conformance.common.results import ConformanceReport, conclude
from kvprune.testing.conformance.models.scenario import Oracle
from kvprune.text import printable, shown, suggestion

__all__ = ["check_adapter", "installed_adapter"]


def check_adapter(
    adapter: type[ModelAdapter] | None,
    make_model: MakeModel | None = None,
    make_inputs: MakeInputs | None = None,
    *,
    only: Collection[str] | None = None,
    expected_failures: Mapping[str, str] | None = None,
    seed: int = 0,
    oracle: Oracle | None = None,
) -> ConformanceReport:
    """Check an adapter against the invariants that it can break, with built-in policies on a tiny model.

    Args:
        adapter: A class derived from `ModelAdapter`, which need not be installed; None for the installed one
            that supports the model.
        make_model: Returns a tiny model of a dtype, on the CPU, in eval mode, the same at each call. Its
            logits must depend on the encoder; `enliven` makes sure that they do.
        make_inputs: Returns a batch for ``generate``: tensors by name, with at least two samples that differ.
            With padding, and with several images if the family has them, the suite finds more.
            Leave out both functions to use ``adapter.example``.
        only: Ids to check ("class", "view", "KV01", ...); all by default.
        expected_failures: Reasons by id: these must fail. That is reported, and is no error.
        seed: Seed of the compression.
        oracle: Called as `masked_oracle` is, for a family that `masked_oracle` does not support. It supports
            Mllama, and what an `EncoderDecoderAdapter` declares.

    Returns:
        The report, if the adapter passed. It says what could not be checked, and why.

    Raises:
        ConformanceError: If something fails, or passes although it is expected to fail; ``.report`` has all.
        UnknownInvariantError: If no check has an id.
        UnsupportedModelError: If ``adapter`` is no adapter, or no installed one supports the model.
        PluginError: If the functions are left out and the adapter has no example.

    Example:
        >>> import kvprune.testing
        >>> def test_my_adapter():
        ...     kvprune.testing.check_adapter(MyAdapter, tiny_model, tiny_inputs)
    """
    expected = dict(expected_failures or {})
    for wanted in (*(only or ()), *expected):
        _require_id(wanted)
    if adapter is None and make_model is not None:
        adapter = load().adapter_for(make_model(torch.float32))
    if not (isinstance(adapter, type) and issubclass(adapter, ModelAdapter)):
        raise UnsupportedModelError(
            f"expected a class derived from kvprune.adapters.ModelAdapter, got {shown(adapter)}"
        )
    if make_model is None or make_inputs is None:
        adapter.example(torch.float32)  # raises here where there is none
    runner = AdapterRunner(adapter, make_model, make_inputs, seed, oracle)
    rows = [row for row in ADAPTER_INVARIANTS if only is None or row.id in only]
    return conclude(adapter.__qualname__, seed, [runner.check(row) for row in rows], expected)


def installed_adapter(name: str) -> type[ModelAdapter] | None:
    """Return the installed adapter of this class name, or that supports a model class of this name.

    Returns:
        None if it must be the name of a policy, because it does not begin with a capital letter.

    Raises:
        UnsupportedModelError: If several adapters have the name, or none has a name that must be a class's.
    """
    known = [entry.cls for entry in load().adapters]
    found = [cls for cls in known if cls.__name__ == name] or [c for c in known if name in c.model_classes]
    if len(found) > 1:
        claims = ", ".join(f"{cls.__module__}.{cls.__qualname__}" for cls in found)
        raise UnsupportedModelError(
            f"{name} is claimed by several adapters: {claims}; give an adapter's name"
        )
    if not found and name[:1].isupper():
        names = sorted(
            {cls.__name__ for cls in known} | {name for cls in known for name in cls.model_classes}
        )
        raise UnsupportedModelError(
            f"no installed adapter is called {shown(name)} or supports a model of that name"
            f"{suggestion(name, names)} (there are {printable(', '.join(names)) or 'none'})"
        )
    return found[0] if found else None


def _require_id(wanted: str) -> None:
    ids = [row.id for row in ADAPTER_INVARIANTS]
    if wanted not in ids:
        raise UnknownInvariantError(
            f"nothing {wanted!r} is checked of an adapter{suggestion(wanted, ids)} "
            f"(there are {', '.join(ids)})"
        )
