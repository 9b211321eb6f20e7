"""Settings of every test (no network, one thread, reproducible examples), and a fixture that tests share."""

import gc
import itertools
import os
import textwrap

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings
from undrawn import leave_out_figures

torch.set_num_threads(1)
gc.disable()  # until all tests are collected: see `pytest_collection_finish`

_common = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
settings.register_profile("default", max_examples=20, **_common)
# pytest --hypothesis-profile=thorough
settings.register_profile("thorough", max_examples=1000, **_common)
settings.load_profile("default")


def pytest_collection_finish():
    """Let garbage collection skip what lives until the end anyway: modules and collected tests.

    Without this, each full collection walks through about a million objects, which took a sixth of all time.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture
def undrawn(monkeypatch):
    """Leave the figures of comparisons out of this test."""
    leave_out_figures(monkeypatch)


_numbers = itertools.count()


@pytest.fixture
def install(tmp_path_factory, monkeypatch):
    """Install a distribution: ``install("dist", entry_point=source of its module, ...)``."""

    def install(distribution, **sources):
        folder = tmp_path_factory.mktemp(distribution)
        lines = ["[kvprune]"]
        for entry_point, source in sources.items():
            module = f"plugin_under_test_{next(_numbers)}"
            (folder / f"{module}.py").write_text(textwrap.dedent(source), "utf-8")
            lines.append(f"{entry_point.replace('_', '-')} = {module}")
        info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        monkeypatch.syspath_prepend(str(folder))
        return folder

    return install
