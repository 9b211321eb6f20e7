"""Real processes: two in one folder, and one that is killed again and again, lose and mix nothing."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from comparison_helpers import contents

from kvprune.comparison import Settings, compare
from kvprune.comparison.data.packages import require
from kvprune.errors import ResultsError
from kvprune.session import registry

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL and file locks")

POLICIES = ("trim", "norm:reach=onward")
RATIOS = (0.5, 0.1)
TASKS, LIMIT, TOKENS = ("read", "count"), 3, 3
CONFIGURATIONS = 1 + (len(POLICIES) + 1) * len(RATIOS)  # the full cache; answer-attention at each ratio
LINES = CONFIGURATIONS * len(TASKS) * LIMIT
PATIENCE = 120.0


def start(output: Path) -> subprocess.Popen[str]:
    """Start a comparison of 42 answers, one at a time, so that there are many moments to be killed at."""
    command = [sys.executable, "-m", "kvprune", "compare", "--output", str(output)]
    command += [part for policy in POLICIES for part in ("--policy", policy)]
    command += ["--keep-ratios", ",".join(map(str, RATIOS)), "--tasks", ",".join(TASKS)]
    command += ["--limit", str(LIMIT), "--batch-size", "1", "--max-new-tokens", str(TOKENS)]
    command += ["--repetitions", "0", "--device", "cpu"]
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def here(output: Path) -> None:
    """Start the same comparison in this process."""
    compare(
        POLICIES,
        RATIOS,
        Settings(
            output=output,
            tasks=TASKS,
            limit=LIMIT,
            batch_size=1,
            max_new_tokens=TOKENS,
            repetitions=0,
            device="cpu",
        ),
    )


def finished_lines(folder: Path) -> list[str]:
    path = folder / "results.jsonl"
    return path.read_bytes().decode().split("\n")[:-1] if path.exists() else []


def wait_for(what: str, process: subprocess.Popen[str], folder: Path, lines: int) -> None:
    """Wait until a file is there and results.jsonl has so many lines, or the process has ended."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None:
        if (folder / what).exists() and len(finished_lines(folder)) >= lines:
            return
        assert time.monotonic() < deadline, "the process neither works nor ends"
        time.sleep(0.002)


def race(folder: Path) -> list[int]:
    """Start two processes at the same moment and a third run while one works; return their exit codes."""
    racers = [start(folder), start(folder)]
    for racer in racers:
        wait_for("results.jsonl", racer, folder, 1)
    if any(racer.poll() is None for racer in racers):
        began, refusal = time.monotonic(), ""
        try:
            here(folder)
        except ResultsError as error:
            refusal = str(error)
        if refusal:  # on a quick machine the winner may have let go of the folder by then
            assert "is in use by another run of kvprune" in refusal
            assert time.monotonic() - began < 2, "it says so at once"
    errors = [racer.communicate(timeout=PATIENCE)[1] for racer in racers]
    for racer, error in zip(racers, errors, strict=True):
        if racer.returncode:
            assert error.splitlines()[-1].startswith("kvprune: error: ")
            assert "is in use by another run of kvprune" in error
    return sorted(racer.returncode for racer in racers)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a race, whose winner nobody disturbs."""
    require("scipy", "matplotlib", "PIL")  # now, so that the third run is quick
    registry.load()
    for _ in range(3):
        folder = tmp_path_factory.mktemp("race") / "new" / "results"
        codes = race(folder)
        if codes == [0, 2]:
            return folder
        assert codes == [0, 0], "one of them runs"  # a busy machine began the second one after the first
    raise AssertionError("no two processes met in three races")


def test_of_two_processes_exactly_one_runs(undisturbed: Path) -> None:
    assert len(finished_lines(undisturbed)) == len(set(finished_lines(undisturbed))) == LINES
    assert {path.name for path in undisturbed.iterdir()} == {
        "manifest.json",
        "results.jsonl",
        "summary.json",
        "accuracy_vs_kept.png",
        "cost_vs_accuracy.png",
        "data",
    }


def kill_and_resume(folder: Path, undisturbed: Path, kills: int, seed: int) -> None:
    """Kill at drawn moments, resume, and compare the end with a run that nobody disturbed."""
    draw = random.Random(seed)
    killed = 0
    for attempt in range(10 * kills):
        have = finished_lines(folder)
        process = start(folder)
        if draw.random() < 0.25 or attempt == 0:  # while the manifest and the data are written
            wait_for(draw.choice((".", "manifest.json", ".kvprune-data", "data")), process, folder, 0)
            time.sleep(draw.random() * 0.05)
        else:
            share = (LINES - len(have)) // (2 + kills - killed)
            wait_for("results.jsonl", process, folder, len(have) + draw.randint(1, max(1, 2 * share)))
            time.sleep(draw.random() * 0.04)
        alive = process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == (-signal.SIGKILL if alive else 0)
        killed += alive
        assert finished_lines(folder)[: len(have)] == have, "what was finished stays as it is"
        if killed == kills:
            break
        if not alive:  # it came to its end: begin anew
            shutil.rmtree(folder)
    assert killed == kills
    last = start(folder)
    _, error = last.communicate(timeout=PATIENCE)
    assert last.returncode == 0, error
    assert (folder / "summary.json").read_bytes() == (undisturbed / "summary.json").read_bytes()
    assert sorted(finished_lines(folder)) == sorted(finished_lines(undisturbed))
    ours, theirs = (json.loads((one / "manifest.json").read_text()) for one in (folder, undisturbed))
    assert ours["run"] == theirs["run"]
    assert contents(folder / "data") == contents(undisturbed / "data")


def test_killed_once(undisturbed: Path, tmp_path: Path) -> None:
    kill_and_resume(tmp_path / "results", undisturbed, kills=1, seed=1)


@pytest.mark.slow
def test_killed_three_times(undisturbed: Path, tmp_path: Path) -> None:
    kill_and_resume(tmp_path / "results", undisturbed, kills=3, seed=1)


@pytest.mark.slow
def test_killed_twenty_times(undisturbed: Path, tmp_path: Path) -> None:
    kill_and_resume(tmp_path / "results", undisturbed, kills=20, seed=2)
