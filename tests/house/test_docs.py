"""The documents say what the code does: examples run, names exist, nothing is left out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from generation import generate, mllama

import kvprune
from kvprune import errors
from kvprune.session import hookspecs
from kvprune.testing import mllama_inputs

ROOT = Path(__file__).parents[2]
DOCS = {path.name: path.read_text("utf-8") for path in [*ROOT.glob("docs/*.md"), ROOT / "README.md"]}


def example(text: str) -> str:
    """Return the code block after the marker."""
    return re.search(r"<!-- test: example -->\n```python\n(.*?)```", text, re.DOTALL)[1]


@pytest.mark.parametrize("page", ["README.md", "write-a-policy.md"])
def test_the_fifteen_line_policy_runs(page):
    code = example(DOCS[page])
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 16, "a policy in fifteen lines"
    space: dict[str, type[kvprune.ScoringPolicy]] = {"__name__": "example"}
    exec(compile(code, page, "exec", dont_inherit=True), space)
    policy = space["ValueSpread"](keep_ratio=0.25)
    with kvprune.compress(mllama(), policy) as run:
        generate(mllama(), mllama_inputs(["tt4ttt", "1tt"]), steps=2)
    assert run.selections[1].counts.tolist() == [[5, 5], [2, 2]]


def test_every_invariant_is_documented_and_tested():
    tests = (ROOT / "tests/engine/test_invariants.py").read_text("utf-8")
    for number in range(1, 16):
        assert re.search(rf"^\| KV{number:02d} ", DOCS["invariants.md"], re.MULTILINE)
        assert f"def test_kv{number:02d}_" in tests


def test_every_hook_is_documented():
    for hook in ("kvprune_policies", "kvprune_adapters"):
        assert hasattr(hookspecs, hook)
        assert f"### `{hook}()`" in DOCS["hooks.md"]


def test_every_policy_is_in_the_readme():
    for name in ("full", "lossless", "uniform", "random", "norm", "trim"):
        assert name in kvprune.list_policies()
        assert f"`{name}`" in DOCS["README.md"]


def test_errors_named_in_documents_exist():
    named = set(re.findall(r"`(\w+Error)`", "\n".join(DOCS.values())))
    assert named
    assert named <= set(errors.__all__)


def test_links_between_documents_lead_somewhere():
    for path in [*ROOT.glob("docs/*.md"), ROOT / "README.md"]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text("utf-8")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_the_quickstart_runs():
    code = re.search(
        r"```python\n(import kvprune\nfrom kvprune import demo.*?)```", DOCS["quickstart.md"], re.DOTALL
    )[1]
    space: dict[str, object] = {}
    torch.manual_seed(0)
    exec(compile(code, "quickstart.md", "exec"), space)
    assert space["run"].report.kept_fraction == pytest.approx(0.25, abs=0.02)
