"""Follows the walk of a documentation page as a newcomer would: its files, its commands, nothing else.

Everything is taken from the page. Packages are really installed, in place, in an environment of its own that
also sees the packages of this one, so nothing here is changed and nothing is downloaded.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

BLOCK = re.compile(r"<!-- walk: ([^>]*?) -->\n(?:<!-- .*? -->\n)?```\w*\n(.*?)```\n", re.DOTALL)


@dataclass
class Step:
    """A command of the walk, its files until then, and what the page says it prints."""

    command: str
    conditions: str
    files: list[tuple[str, str, str]]
    prints: list[str] = field(default_factory=list)
    looks_like: list[str] = field(default_factory=list)


def read(page: str) -> list[Step]:
    """Return the commands of a page in order, each with the files that stand before it."""
    steps: list[Step] = []
    files: list[tuple[str, str, str]] = []
    for marker, body in BLOCK.findall(page):
        word, _, rest = marker.partition(" ")
        if word in ("file", "append"):
            files.append((word, rest, body))
        elif word == "run":
            (command,) = body.splitlines()
            steps.append(Step(command, rest, files))
            files = []
        elif marker == "prints":
            steps[-1].prints = body.splitlines()
        elif marker == "looks like":
            steps[-1].looks_like = body.splitlines()
        else:
            raise AssertionError(f"unknown marker {marker!r}")
    assert not files, "files that no command uses"
    assert page.count("<!-- walk:") == len(BLOCK.findall(page))
    return steps


class Walk:
    """A folder and an environment in which the steps are taken, each once and in order."""

    def __init__(self, root: Path, steps: list[Step]) -> None:
        self.steps = steps
        self.folder = root / "folder"
        self.folder.mkdir()
        environment = root / "environment"
        venv.create(environment, with_pip=False)
        paths = {"base": str(environment), "platbase": str(environment)}
        site_packages = Path(sysconfig.get_path("purelib", scheme="venv", vars=paths))
        ours = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        # Unlike a plain line of a .pth file, this also follows the .pth files of editable installs there.
        lines = [f"import site; site.addsitedir({path!r})" for path in ours]
        (site_packages / "outer.pth").write_text("\n".join(lines) + "\n")
        scripts = Path(sysconfig.get_path("scripts", scheme="venv", vars=paths))
        self.python = str(scripts / ("python.exe" if os.name == "nt" else "python"))
        self.outputs: dict[str, str] = {}

    def reach(self, step: Step) -> str:
        """Take the steps that lead to a step and are not taken yet, then the step; return what it prints."""
        for earlier in self.steps[: self.steps.index(step)]:
            if earlier.command not in self.outputs and not earlier.conditions:
                self.take(earlier)
        return self.outputs[step.command] if step.command in self.outputs else self.take(step)

    def take(self, step: Step) -> str:
        """Write the files of a step, run its command, and return what it prints."""
        for word, name, body in step.files:
            target = self.folder / name
            assert target.exists() == (word == "append"), name
            with target.open("a", encoding="utf-8") as file:
                file.write(body)
        program, *arguments = shlex.split(step.command)
        words = {
            "python": [self.python],
            "pip": [self.python, "-m", "pip", "--disable-pip-version-check"],
            "kvprune": [self.python, "-m", "kvprune"],
            "pytest": [self.python, "-m", "pytest", "-p", "no:cacheprovider"],
        }[program]
        if program == "pip":
            arguments += ["--no-index", "--no-build-isolation"]  # no network
        settings = {name: value for name, value in os.environ.items() if name != "KVPRUNE_PLUGINS"}
        settings |= {
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "120",
            "PYTHONIOENCODING": "utf-8",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [*words, *arguments],
            cwd=self.folder,
            env=settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{step.command}\n{done.stdout}"
        self.outputs[step.command] = done.stdout
        return done.stdout


def squeezed(text: str) -> str:
    """Return a text with single blanks: tables are as wide as their contents."""
    return " ".join(text.split())


def as_parameters(steps: list[Step]) -> list[Any]:
    """Return the steps for `pytest.mark.parametrize`."""
    return [
        pytest.param(
            step,
            id=step.command.partition(" --")[0],
            marks=[pytest.mark.slow] if "slow" in step.conditions else [],
        )
        for step in steps
    ]


def require_printed(step: Step, output: str) -> None:
    """Raise unless a command has printed what the page says."""
    output = squeezed(output)
    position = 0
    for line in map(squeezed, step.prints):
        if line and line != "...":
            assert line in output[position:], f"{step.command} no longer prints {line!r}, but:\n{output}"
            position += output[position:].index(line)
    # Numbers may differ in other environments; that each row is there may not.
    for line in step.looks_like[2:]:
        if line[:1].isalpha() and "  " in line:
            assert line.split("  ")[0] in output
