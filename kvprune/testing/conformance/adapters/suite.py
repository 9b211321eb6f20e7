"""`check_adapter`: resolves what is to be checked, runs the table of adapters, reports."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvprune.adapters.base import ModelAdapter
from kvprune.errors import UnknownInvariantError, UnsupportedModelError
from kvprune.policy.base import CrossKVPolicy
from kvprune.session.registry import load
from kvprune.testing.conformance.adapters.table import (
    ADAPTER_INVARIANTS,
    SETTINGS,
    AdapterInvariant,
)
from kvprune.testing.conformance.common.findings import (
    ConformanceReport,
    NotApplicable,
    Result,
    Violation,
)
from kvprune.testing.conformance.common.reproducers import adapter_snippet
from kvprune.testing.conformance.common.search import run_check
from kvprune.testing.conformance.models.setting import Oracle, Setting
from kvprune.testing.conformance.policies.suite import as_expected, failure_of
from kvprune.text import printable, shown, suggestion

__all__ = ["MakeInputs", "MakeModel", "check_adapter", "installed_adapter"]

MakeModel = Callable[[torch.dtype], Any]
MakeInputs = Callable[[torch.dtype], dict[str, Tensor]]


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
            that knows the model.
        make_model: Returns a tiny model of a dtype, on the CPU, in eval mode, the same at each call. Its
            encoder must matter, which `enliven` sees to.
        make_inputs: Returns a batch for ``generate``: tensors by name, two samples at least that differ.
            Padding and, where the family has them, several images let the suite see more.
            Leave out both functions to use ``adapter.example``.
        only: Ids to check ("class", "view", "KV01", ...); all by default.
        expected_failures: Reasons by id: these must fail, which is reported and is no error.
        seed: Of the compression.
        oracle: Called as `masked_oracle` is, for a family that it does not know. It knows Mllama and whatever
            an `EncoderDecoderAdapter` declares.

    Returns:
        The report, if the adapter passed. What could not be checked says why.

    Raises:
        ConformanceError: If something fails, or passes although it is expected to fail; ``.report`` has all.
        UnknownInvariantError: If there is nothing of an id.
        UnsupportedModelError: If ``adapter`` is no adapter, or no installed one knows the model.
        PluginError: If there are no functions and the adapter has no example.

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
    bench = _Bench(adapter, make_model, make_inputs, seed, oracle)
    rows = [row for row in ADAPTER_INVARIANTS if only is None or row.id in only]
    results = [bench.check(row) for row in rows]
    report = ConformanceReport(
        subject=adapter.__qualname__,
        seed=seed,
        results=tuple(as_expected(result, expected.get(result.id)) for result in results),
    )
    if not report.passed:
        raise failure_of(report)
    return report


def installed_adapter(name: str) -> type[ModelAdapter] | None:
    """Return the installed adapter of this class name, or that supports a model class of this name.

    Returns:
        None if the name can only be a policy's: these do not begin with a capital letter.

    Raises:
        UnsupportedModelError: If there are several, or none of a name that must be a class's.
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


class _Bench:
    """Runs rows of the table on one adapter; builds each setting only once."""

    def __init__(
        self,
        adapter: type[ModelAdapter],
        make_model: MakeModel | None,
        make_inputs: MakeInputs | None,
        seed: int,
        oracle: Oracle | None,
    ) -> None:
        self._adapter, self._seed, self._oracle = adapter, seed, oracle
        self._given = make_model, make_inputs
        self._make_model = make_model or (lambda dtype: adapter.example(dtype)[0])
        self._make_inputs = make_inputs or (lambda dtype: adapter.example(dtype)[1])
        self._models: dict[tuple[str, str], Any] = {}
        self._settings: dict[str, Setting] = {}
        self._policies: dict[str, CrossKVPolicy] = {}

    def check(self, row: AdapterInvariant) -> Result:
        """Run all cases of one row, until one fails."""
        start, posed, reasons = time.perf_counter(), 0, list[str]()
        for setting in self._settings.values():
            setting.renew()  # what an adapter leaves behind is found by KV12, and disturbs no other row
        for cases in row.cases:
            for name in cases.settings:
                for spec in cases.policies:
                    one = partial(self._one, cases.check, name, spec, reasons)
                    before = len(reasons)
                    violation = run_check(one)
                    posed += len(reasons) == before
                    if violation is not None:
                        return self._failed(row, violation, posed, time.perf_counter() - start, name, spec)
        return Result(
            id=row.id,
            title=row.title,
            outcome="passed" if posed else "not applicable",
            problems=posed,
            seconds=time.perf_counter() - start,
            detail="; ".join(dict.fromkeys(reasons)),
        )

    def _one(
        self,
        check: Callable[[CrossKVPolicy, Setting], None],
        name: str,
        spec: str,
        reasons: list[str],
    ) -> None:
        if spec not in self._policies:
            self._policies[spec] = load().get_policy(spec)
        try:
            check(self._policies[spec], self._setting(name))
        except NotApplicable as reason:
            reasons.append(str(reason))

    def _failed(
        self, row: AdapterInvariant, violation: Violation, posed: int, seconds: float, name: str, spec: str
    ) -> Result:
        dtype, attention, beams = SETTINGS[name]
        where = f"{spec}, {dtype}, {f'{beams} beams' if beams > 1 else 'greedy'}"
        return Result(
            id=row.id,
            title=row.title,
            outcome="failed",
            problems=posed,
            seconds=seconds,
            detail=f"{violation.detail}\nunder {where}{f', {attention} attention' if attention else ''}",
            reproducer=adapter_snippet(
                row.id, self._adapter, *self._given, seed=self._seed, oracle=self._oracle
            ),
        )

    def _setting(self, name: str) -> Setting:
        if name not in self._settings:
            dtype, attention, beams = SETTINGS[name]
            inputs = self._make_inputs(getattr(torch, dtype))
            model = self._model(dtype, attention)
            self._settings[name] = Setting(
                model, inputs, beams, steps=4, seed=self._seed, adapter=self._adapter, oracle=self._oracle
            )
        return self._settings[name]

    def _model(self, dtype: str, attention: str) -> Any:
        if (dtype, attention) not in self._models:
            model = copy.deepcopy(self._make_model(getattr(torch, dtype)))
            if attention:
                try:
                    model.set_attn_implementation(attention)
                except (ValueError, ImportError, AttributeError) as error:
                    text = f"{type(model).__name__} has no {attention} attention ({str(error)[:200]})"
                    raise NotApplicable(text) from error
            self._models[dtype, attention] = model
        return self._models[dtype, attention]
