"""The house: who may import whom, what an import does, and what is installed."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = [
    "errors",
    "text",
    "directions",
    "merging",
    "quantization",
    "pools",
    "selection",
    "buckets",
    "visibility",
    "layout",
    "scoring",
    "allocation",
    "neighbours",
    "likeness",
    "seeding",
    "text_view",
    "view",
    "evenly",
    "judgement",
    "spec",
    "options",
    "policy",
    "windows",
    "nesting",
    "moments",
    "allocators",
    "hookspecs",
    "cache",
    "text_cache",
    "caches",
    "guidance",
    "report",
    "receipts",
    "prefill",
    "keeping",
    "manager",
    "adapters",
    "plugins",
    "registry",
    "guide",
    "session",
    "early_exit",
    "demo",
    "ablation",
    "bench",
    "doctor",
    "cli",
]


def imports(path: Path) -> set[str]:
    """Return the modules that a file imports when it is imported itself (not inside functions)."""
    found = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def part(module: str) -> str:
    """Return the part of the house that a module of kvprune belongs to."""
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("path", sorted((ROOT / "kvprune").rglob("*.py")), ids=lambda path: path.stem)
def test_modules_import_only_what_stands_left_of_them(path):
    own = part(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if own in ("__init__", "__main__", "testing"):
        return
    for module in imports(path):
        if module.startswith("kvprune.") and part(module) in ORDER:
            assert ORDER.index(part(module)) <= ORDER.index(own), f"{own} imports {module}"


def test_only_adapters_and_testing_touch_models_of_transformers():
    for path in (ROOT / "kvprune").rglob("*.py"):
        if not {"adapters", "testing", "demo"} & set(path.parts):
            assert "transformers.models" not in path.read_text("utf-8"), path


def test_the_framework_does_not_know_its_strategies():
    for path in (ROOT / "kvprune").rglob("*.py"):
        assert "kvprune_strategies" not in path.read_text("utf-8"), path


def test_built_in_policies_decide_and_never_touch_what_holds_state():
    state = {"adapters", "cache", "caches", "manager", "plugins", "receipts", "registry", "session"}
    for path in (ROOT / "strategies").rglob("*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "kvprune":
                assert part(node.module) not in state, f"{path.name} imports {node.module}"


def test_an_import_changes_nothing_and_loads_no_plugin():
    code = """
import json, sys
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
import transformers.cache_utils as cache_utils
def state():
    tables = sorted(ALL_ATTENTION_FUNCTIONS.keys()), sorted(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING)
    return [tables, [id(ALL_ATTENTION_FUNCTIONS[name]) for name in tables[0]]]
before = state()
import kvprune
print(json.dumps([before == state(), "kvprune_strategies" in sys.modules, "sklearn" in sys.modules,
                  "matplotlib" in sys.modules, "typer" in sys.modules and "kvprune.cli" in sys.modules]))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == [True, False, False, False, False]


def test_nothing_generic_is_installed():
    code = "import importlib.metadata as m; print(m.distribution('kvprune').read_text('top_level.txt') or '')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert set(run.stdout.split()) == {"kvprune", "kvprune_strategies"}
    for name in ("strategies", "tests", "docs"):
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is not None)"
        assert subprocess.run([sys.executable, "-c", code], cwd="/", check=False).returncode == 0, name


def test_policies_are_found_from_any_directory(tmp_path):
    code = "import kvprune; print(*kvprune.list_policies())"
    for folder in (tmp_path, ROOT):
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder
        )
        assert {"full", "lossless", "uniform", "random", "norm", "trim"} <= set(run.stdout.split())
