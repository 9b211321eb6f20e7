"""Run transformers' own tests of the supported families under policies, and compare with what is expected.

    python tests/others/run.py FOLDER

`FOLDER` is a source checkout of the installed transformers. The README beside this file says how to get one.
First the tests run as they are (``stock``). Those that pass there, and call a supported model, run again
under each policy; `under_policy.py` attaches it. Every failure must be listed in `expected.toml` with its
error and a reason. The script fails if a test fails that is not listed, if a listed one passes or fails with
another error, or if policies decided in fewer tests than before.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import transformers

HERE = Path(__file__).parent
FAMILIES = ("mllama", "bart", "whisper")
POLICIES = ("full", "lossless", "norm:keep_ratio=0.5", "trim:keep_ratio=0.5")

Outcomes = dict[str, dict[str, Any]]
"""How each test ended, by its id; see `Recorder` in `under_policy.py`."""


class RefusedError(Exception):
    """The script cannot run with what it was given; the message says what would be right."""


@dataclass(frozen=True)
class Expectation:
    """Tests that fail under some policies, and why.

    Attributes:
        policies: Names of the policies.
        tests: Patterns, as a shell has them, for ``family::Class::test``.
        error: Name of the exception.
        reason: Why it is right that these tests fail, or what has to be cured.
        message: Regular expression that is found in the exception's text.
        sometimes: Whether the outcome depends on random weights, so that the tests may pass as well.
    """

    policies: tuple[str, ...]
    tests: tuple[str, ...]
    error: str
    reason: str
    message: str = ""
    sometimes: bool = False

    def covers(self, policy: str, test: str) -> bool:
        """Whether this is about a test under a policy (a spec)."""
        name = policy.split(":")[0]
        return name in self.policies and any(fnmatchcase(test, pattern) for pattern in self.tests)

    def explains(self, outcome: Mapping[str, Any]) -> bool:
        """Whether a failure is the one that is expected."""
        found = re.search(self.message, outcome["message"]) is not None
        return bool(outcome["error"] == self.error and found)


@dataclass(frozen=True)
class Expected:
    """The content of `expected.toml`.

    Attributes:
        failures: Expected failures.
        decided: Fewest tests in which policies decide, by family and name of the policy.
    """

    failures: tuple[Expectation, ...]
    decided: Mapping[str, Mapping[str, int]]

    @classmethod
    def read(cls, path: Path) -> Expected:
        """Read the file.

        Raises:
            RefusedError: If an entry lacks a field, has one too many, or has no reason.
        """
        content = tomllib.loads(path.read_text("utf-8"))
        failures = []
        for number, entry in enumerate(content.get("expected", []), 1):
            lists = {name: tuple(entry.pop(name, ())) for name in ("policies", "tests")}
            try:
                expectation = Expectation(**lists, **entry)
            except TypeError as error:
                raise RefusedError(f"entry {number} of {path.name}: {error}") from error
            if not (expectation.policies and expectation.tests and expectation.reason.strip()):
                raise RefusedError(f"entry {number} of {path.name} needs policies, tests and a reason")
            failures.append(expectation)
        return cls(tuple(failures), content.get("decided", {}))


@dataclass(frozen=True)
class Verdict:
    """What one family's tests said about one policy.

    Attributes:
        tests: Number of tests.
        passed: Number of those that passed.
        as_expected: Number of those that failed as expected.
        decided: Number of those in which the policy decided.
        problems: What is not as expected, one line each.
    """

    tests: int
    passed: int
    as_expected: int
    decided: int
    problems: tuple[str, ...]


def judge(
    family: str, policy: str, outcomes: Outcomes, expected: Expected, *, partly: bool = False
) -> Verdict:
    """Compare outcomes under a policy with what is expected.

    Args:
        family: The family.
        policy: Spec of the policy.
        outcomes: How the tests ended that pass in stock transformers.
        expected: What is expected.
        partly: Whether only some of the tests ran, so that nothing can be said about how many are decided.
    """
    problems: list[str] = []
    passed = as_expected = 0
    for test, outcome in outcomes.items():
        covering = [each for each in expected.failures if each.covers(policy, f"{family}::{short(test)}")]
        end = f"{family}::{short(test)}"
        if outcome["outcome"] == "passed":
            passed += 1
            problems += [
                f"{end} passes, but is expected to fail: {each.reason}"
                for each in covering
                if not each.sometimes
            ]
        elif outcome["outcome"] == "failed":
            if any(each.explains(outcome) for each in covering):
                as_expected += 1
                continue
            known = " (another failure is expected)" if covering else ""
            problems.append(f"{end} fails{known}: {outcome['error']}: {outcome['message']}")
        else:
            problems.append(f"{end} passes in stock transformers, but did not finish: {outcome['outcome']}")
    decided = sum(outcome["prefills"] > 0 for outcome in outcomes.values())
    least = expected.decided.get(family, {}).get(policy.split(":")[0], 1)
    if decided < least and not partly:
        problems.append(f"{family}: the policy decided in {decided} tests; at least {least} are expected")
    return Verdict(len(outcomes), passed, as_expected, decided, tuple(problems))


def short(test: str) -> str:
    """Return the id of a test without its file: ``Class::test``."""
    return test.split("::", 1)[-1]


def check_checkout(folder: Path, families: Iterable[str]) -> None:
    """Refuse a folder that holds no tests of the installed transformers.

    Raises:
        RefusedError: With what is missing, and what would be right.
    """
    how = (
        f"give the folder of a source checkout of transformers {transformers.__version__}: "
        f"a git clone of its repository at the tag v{transformers.__version__}"
    )
    source = folder / "src" / "transformers" / "__init__.py"
    if not source.is_file():
        raise RefusedError(f"{folder} is no source checkout of transformers: it has no {source.name}; {how}")
    stated = re.search(r"^__version__ = \"([^\"]+)\"", source.read_text("utf-8"), re.MULTILINE)
    version = stated[1] if stated else "unknown"
    if version != transformers.__version__:
        raise RefusedError(
            f"{folder} holds transformers {version}, but {transformers.__version__} is installed; {how}"
        )
    for family in families:
        if not (folder / test_file(family)).is_file():
            raise RefusedError(f"{folder} has no {test_file(family)}; {how}")


def test_file(family: str) -> str:
    """Return the path of a family's tests in the checkout."""
    return f"tests/models/{family}/test_modeling_{family}.py"


def run_tests(folder: Path, family: str, policy: str, work: Path, only: Sequence[str] | None) -> Outcomes:
    """Run a family's tests under a policy, in a process of its own.

    Args:
        folder: The checkout.
        family: The family.
        policy: Spec of the policy, or ``stock``.
        work: Folder for the output of pytest.
        only: Ids of the tests; None runs all.

    Raises:
        RefusedError: If pytest ended before it wrote outcomes.
    """
    name = re.sub(r"\W+", "-", f"{family}-{policy}")
    record, log = work / f"{name}.json", work / f"{name}.log"
    record.unlink(missing_ok=True)
    # -n0: some plugins of the checkout need pytest-xdist, but the tests run in one process, always in the
    # same order. addopts and log_cli replace settings of the checkout that change the output.
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "-p", "under_policy"]
    command += ["-o", "addopts=", "-o", "log_cli=false", f"--rootdir={folder}"]
    command += [f"--under-policy={policy}", f"--outcomes={record}"]
    if only is not None:
        ids = work / f"{name}.txt"
        ids.write_text("\n".join(only), "utf-8")
        command += [f"--only-these={ids}"]
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}
    with log.open("w", encoding="utf-8") as output:
        subprocess.run(
            [*command, test_file(family)],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    outcomes = json.loads(record.read_text("utf-8")) if record.is_file() else {}
    if not outcomes:
        text = log.read_text("utf-8", errors="replace")
        module = re.search(r"No module named '([^']+)'", text)
        if module:
            raise RefusedError(
                f"the tests of {family} import {module[1]}, which is not installed: see the README ({log})"
            )
        tail = "\n".join(text.splitlines()[-15:])
        raise RefusedError(f"pytest ran no test of {family} under {policy}; the end of {log}:\n{tail}")
    return outcomes


def chosen(stock: Outcomes, pattern: str) -> list[str]:
    """Return the tests that run under policies: they pass in stock, and call a supported model."""
    return [
        test
        for test, outcome in stock.items()
        if outcome["outcome"] == "passed" and outcome["models"] and re.search(pattern, test)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 if all is as expected, 1 if not, 2 if it cannot run."""
    parser = argparse.ArgumentParser(description="Run transformers' own tests under policies of kvprune.")
    parser.add_argument("folder", type=Path, help="source checkout of the installed transformers")
    parser.add_argument("--policy", action="append", help=f"spec; may be repeated (default: {POLICIES})")
    parser.add_argument("--family", action="append", help=f"may be repeated (default: {FAMILIES})")
    parser.add_argument("--tests", default="", help="regular expression for ids; guards on counts are off")
    parser.add_argument("--output", type=Path, help="folder for logs and outcomes (default: a temporary one)")
    parser.add_argument("--stock", type=Path, help="folder with outcomes of stock from an earlier --output")
    parser.add_argument("--expected", type=Path, default=HERE / "expected.toml", help="expected failures")
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except RefusedError as error:
        print(f"cannot run: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    families, policies = options.family or FAMILIES, options.policy or POLICIES
    folder = options.folder.resolve()
    check_checkout(folder, families)
    expected = Expected.read(options.expected)
    work = (options.output or Path(tempfile.mkdtemp(prefix="others-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    print(f"transformers {transformers.__version__}; output in {work}")
    print(f"{'family':10}{'policy':24}{'tests':>7}{'passed':>8}{'expected failures':>19}{'decided':>9}")
    problems = []
    for family in families:
        earlier = None if options.stock is None else options.stock / f"{family}-stock.json"
        if earlier is not None and not earlier.is_file():
            raise RefusedError(f"{earlier} does not exist; leave --stock out to run the tests in stock first")
        stock = (
            json.loads(earlier.read_text("utf-8"))
            if earlier is not None
            else run_tests(folder, family, "stock", work, None)
        )
        only = chosen(stock, options.tests)
        ends = [outcome["outcome"] for outcome in stock.values()]
        print(
            f"{family:10}{'stock':24}{len(stock):7}{ends.count('passed'):8}   "
            f"({ends.count('failed')} fail, {ends.count('skipped')} are skipped, {len(only)} go on)",
            flush=True,
        )
        if not only:
            raise RefusedError(
                f"no test of {family} passes in stock transformers and calls a supported model"
            )
        for policy in policies:
            outcomes = run_tests(folder, family, policy, work, only)
            verdict = judge(family, policy, outcomes, expected, partly=bool(options.tests))
            print(
                f"{family:10}{policy:24}{verdict.tests:7}{verdict.passed:8}{verdict.as_expected:19}"
                f"{verdict.decided:9}",
                flush=True,
            )
            problems += [f"{policy}: {problem}" for problem in verdict.problems]
    for problem in problems:
        print(f"NOT EXPECTED  {problem}")
    print(f"{len(problems)} outcomes are not as expected" if problems else "all outcomes are as expected")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
