"""Fixtures that tests of comparisons share: data files, configurations, a summary."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comparison_helpers import SMALL_POLICIES, SMALL_RATIOS, answer, example, small_settings
from PIL import Image
from undrawn import leave_out_figures

from kvprune.comparison import compare
from kvprune.comparison.plan.grid import Configuration, expand
from kvprune.comparison.statistics.summary import Summary, summarise
from kvprune.comparison.storage.timings import Lap

Rows = list[Any]


@pytest.fixture
def drawn() -> None:
    """Comparisons of this test draw their figures."""


@pytest.fixture(autouse=True)
def without_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave figures out, unless a test asks for `drawn`; fixtures of modules draw them."""
    if "drawn" not in request.fixturenames:
        leave_out_figures(monkeypatch)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[[Rows], Path]:
    """Write rows (strings as they are, anything else as JSON) beside a good picture named good.png."""
    Image.new("RGB", (8, 6), "red").save(tmp_path / "good.png")

    def write(rows: Rows) -> Path:
        path = tmp_path / "data.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def configurations() -> tuple[Configuration, ...]:
    return expand(["lossless", "random:reach=onward", "trim"], [0.5, 0.1])


@pytest.fixture
def summary(configurations: tuple[Configuration, ...]) -> Summary:
    """Ten examples of two tasks; every second answer of everything but full and lossless is wrong."""
    examples = [example(number, "read" if number < 6 else "count") for number in range(10)]
    answers = {}
    for one in configurations:
        for number, asked in enumerate(examples):
            wrong = one.budget and number % 2
            kept = one.keep_ratio or 1.0
            answers[one.spec, None, asked.id] = answer(one.spec, asked, "8" if wrong else "7", kept=kept)
    laps = {
        repetition: {
            None: Lap(0.9, 1.65),
            **{one.spec: Lap(1.0 if one.spec == "full" else 0.5, 2.5) for one in configurations},
        }
        for repetition in range(3)
    }
    return summarise(
        configurations, examples, answers, laps, batch_size=4, device="cpu", reread=True, against="trim"
    )


@pytest.fixture(scope="session")
def finished_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished small comparison with timings; tests copy it before they change anything."""
    folder = tmp_path_factory.mktemp("session") / "results"
    with pytest.MonkeyPatch.context() as patch:
        leave_out_figures(patch)
        compare(SMALL_POLICIES, SMALL_RATIOS, small_settings(folder))
    return folder


@pytest.fixture
def folder(finished_folder: Path, tmp_path: Path) -> Path:
    """A copy of `finished_folder` to damage."""
    return shutil.copytree(finished_folder, tmp_path / "results")
