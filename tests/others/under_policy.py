"""A pytest plugin that runs every test of somebody else under a policy, and writes down how each ended.

`run.py` loads it (``-p under_policy``). While a test runs, each supported model is put under the policy the
first time it generates or is called, and stays under it until the test ends. Without a policy (``stock``)
nothing is attached: the outcomes tell what stock transformers does, and which tests call a supported model.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from torch import nn
from transformers.generation import GenerationMixin

import kvprune
from kvprune.adapters.attachment import compressing
from kvprune.errors import CompressionStateError, UnsupportedModelError
from kvprune.session.registry import find_adapter


class UnderPolicy:
    """Puts models under one policy while one test runs.

    Args:
        spec: Spec of the policy; None attaches nothing.
    """

    def __init__(self, spec: str | None) -> None:
        self.spec = spec
        # The models are held, so that no other object gets their id while the test runs.
        self.runs: list[tuple[nn.Module, kvprune.Compression]] = []
        self.known: dict[int, object] = {}
        self.supported = 0
        self._restore: list[Callable[[], None]] = []

    def start(self) -> None:
        """Watch the calls of all models from now on."""
        self.supported = 0
        self._watch(transformers.PreTrainedModel, "__call__", nn.Module.__call__)
        for cls in [GenerationMixin, *_subclasses(GenerationMixin)]:
            if "generate" in vars(cls):
                self._watch(cls, "generate", vars(cls)["generate"])

    def stop(self) -> list[kvprune.Compression]:
        """Stop watching, take every model out of the policy, and return what ran.

        Raises:
            CompressionStateError: If something of kvprune is still attached to a model (KV12).
        """
        while self._restore:
            self._restore.pop()()
        models = [model for model, _ in self.runs]
        runs = [run for _, run in self.runs]
        for run in runs:
            run.detach()
        self.runs, self.known = [], {}
        left = [label for label in map(compressing, models) if label]
        if left:
            raise CompressionStateError(f"after the test, models are still compressed: {left}")
        return runs

    def _watch(self, cls: type, name: str, original: Callable[..., Any]) -> None:
        own = vars(cls).get(name)

        @functools.wraps(original)
        def watched(model: Any, *args: Any, **kwargs: Any) -> Any:
            self._put_under_policy(model)
            return original(model, *args, **kwargs)

        def restore() -> None:
            if own is None:
                delattr(cls, name)
            else:
                setattr(cls, name, own)

        setattr(cls, name, watched)
        self._restore.append(restore)

    def _put_under_policy(self, model: nn.Module) -> None:
        """Attach the policy to a model, unless it is a part of one that runs under it."""
        if id(model) in self.known:
            return
        self.known[id(model)] = model
        try:
            find_adapter(model)
        except UnsupportedModelError:
            return
        self.supported += 1
        if self.spec is None:
            return
        parts = set(model.modules())
        for other, run in self.runs:
            if run.is_attached and model in set(other.modules()):
                return
            if run.is_attached and other in parts:
                run.detach()  # the test called the part first; from now on the whole model is compressed
        run = kvprune.compress(model, self.spec)
        self.runs.append((model, run))
        run.attach()


def _subclasses(cls: type) -> Iterator[type]:
    for below in cls.__subclasses__():
        yield below
        yield from _subclasses(below)


class Recorder:
    """Runs each test under the policy, and writes the outcomes to a file when the session ends.

    Args:
        spec: Spec of the policy; None for stock transformers.
        record: The file; JSON, one entry for each test.
        only: Ids of the tests to run; None runs all.
    """

    def __init__(self, spec: str | None, record: Path, only: set[str] | None) -> None:
        self.under_policy = UnderPolicy(spec)
        self.record = record
        self.only = only
        self.tests: dict[str, dict[str, Any]] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out tests that are not to run."""
        if self.only is not None:
            left_out = [item for item in items if item.nodeid not in self.only]
            items[:] = [item for item in items if item.nodeid in self.only]
            config.hook.pytest_deselected(items=left_out)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """Run one test under the policy, from the same random numbers in every run."""
        _seed(item)
        entry = self._entry(item.nodeid)
        self.under_policy.start()
        try:
            result = yield
        finally:
            runs = self.under_policy.stop()
            entry["models"] = self.under_policy.supported
            entry["prefills"] = sum(run.report.prefills for run in runs)
        for run in runs:
            run.check_ran()
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        """Note how a test ended, and with which error."""
        report = yield
        entry = self._entry(item.nodeid)
        entry["seconds"] = round(entry["seconds"] + call.duration, 3)
        if report.failed and entry["outcome"] != "failed":
            error = call.excinfo.value if call.excinfo else None
            entry.update(outcome="failed", error=type(error).__name__, message=_first_lines(error))
        elif report.skipped and entry["outcome"] is None:
            entry.update(outcome="skipped", message=str(call.excinfo.value) if call.excinfo else "")
        elif report.passed and report.when == "call" and entry["outcome"] is None:
            entry["outcome"] = "passed"
        return report

    def pytest_sessionfinish(self) -> None:
        """Write the file."""
        self.record.write_text(json.dumps(self.tests, indent=1), "utf-8")

    def _entry(self, test: str) -> dict[str, Any]:
        text = {"outcome": None, "error": "", "message": ""}
        return self.tests.setdefault(test, {**text, "models": 0, "prefills": 0, "seconds": 0.0})


def _first_lines(error: BaseException | None) -> str:
    return " ".join(str(error).split())[:400]


def _seed(item: pytest.Item) -> None:
    """Set all seeds, also those of generators that modules of the tests hold."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    for module in list(sys.modules.values()):
        own = getattr(module, "global_rng", None)
        if isinstance(own, random.Random):
            own.seed(0)


def _lift_time_limits() -> None:
    """Some tests may take one second: that says how busy the machine is, and nothing about a policy."""
    if importlib.util.find_spec("timeout_decorator") is not None:
        limits = importlib.import_module("timeout_decorator")
        limits.timeout = lambda *args, **kwargs: lambda test: test


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that `run.py` passes."""
    group = parser.getgroup("kvprune")
    group.addoption("--under-policy", default="stock", help="spec of the policy, or stock")
    group.addoption("--outcomes", required=False, help="the file to which outcomes are written")
    group.addoption("--only-these", default=None, help="a file with the ids of the tests to run, one a line")


def pytest_configure(config: pytest.Config) -> None:
    """Register the recorder."""
    spec, record = config.getoption("--under-policy"), config.getoption("--outcomes")
    if record is None:
        raise pytest.UsageError("--outcomes is missing: the file to which outcomes are written")
    if spec != "stock":
        kvprune.get_policy(spec)  # a wrong spec ends the run, not each test
    only = config.getoption("--only-these")
    names = None if only is None else set(Path(only).read_text("utf-8").splitlines())
    _lift_time_limits()
    config.pluginmanager.register(Recorder(None if spec == "stock" else spec, Path(record), names))
