"""The house: who may import whom, what an import does, and what is installed."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Collection
from pathlib import Path

import pytest

import kvprune

ROOT = Path(__file__).parents[2]
ROOMS = (
    "tokens",
    "scoring",
    "cache",
    "policy",
    "engine",
    "adapters",
    "session",
    "testing",
    "demo",
    "comparison",
    "training",
    "cli",
)
"""From the ground up: a room imports from itself, from rooms before it, and from errors.py and text.py."""

GROUND = ("errors", "text")
MOST_LINES = 350
MOST_FLOORS = 12


def modules() -> dict[str, Path]:
    """Return every module of the package by its dotted name."""
    found = {}
    for path in sorted((ROOT / "kvprune").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: Collection[str]) -> set[str]:
    """Return the modules of the package that a file imports anywhere: in functions and for types, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}: a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in known else node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return {name for name in found if name.split(".")[0] == "kvprune"}


def room(module: str) -> str:
    """Return the room that a module of kvprune belongs to, "" for the front door."""
    return module.split(".")[1] if "." in module else ""


MODULES = modules()
GRAPH = {name: imports(path, MODULES) for name, path in MODULES.items()}


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_every_import_points_down(module):
    own = room(module)
    if own in ("", "__main__"):  # the front door opens to every room
        return
    allowed = {own} if own in GROUND else {*GROUND, *ROOMS[: ROOMS.index(own) + 1]}
    for target in GRAPH[module]:
        assert room(target) in allowed, f"{module} imports {target}, which stands above it"


def test_the_picture_of_imports_has_few_floors():
    below = {
        own: {room(target) for name in GRAPH if room(name) == own for target in GRAPH[name]} for own in ROOMS
    }
    heights = dict.fromkeys(GROUND, 1)
    for own in ROOMS:
        heights[own] = 1 + max((heights[target] for target in below[own] - {own}), default=0)
    assert max(heights.values()) <= MOST_FLOORS


def floors() -> dict[str, int]:
    """Return the floor of each room's highest file: one more than the highest that it imports in the room."""
    heights: dict[str, int] = {}

    def height(module: str, path: tuple[str, ...] = ()) -> int:
        assert module not in path, " -> ".join((*path, module))
        if module not in heights:
            below = {target for target in GRAPH.get(module, ()) if target in GRAPH} - {module}
            heights[module] = 1 + max((height(target, (*path, module)) for target in below), default=0)
        return heights[module]

    for module in GRAPH:
        height(module)
    return heights


def test_no_imports_go_round_in_circles():
    assert floors()


def test_no_file_is_longer_than_a_reader_can_hold():
    for name, path in modules().items():
        assert len(path.read_text("utf-8").splitlines()) <= MOST_LINES, name


def test_each_test_file_has_a_name_of_its_own():
    """The folders of tests are no packages, so pytest refuses two files of the same name."""
    paths: dict[str, Path] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        assert paths.setdefault(path.name, path) == path, f"{paths[path.name]} and {path}"


def test_only_adapters_and_testing_touch_models_of_transformers():
    for path in (ROOT / "kvprune").rglob("*.py"):
        if not {"adapters", "testing", "demo"} & set(path.parts):
            assert "transformers.models" not in path.read_text("utf-8"), path


def test_the_framework_does_not_know_its_strategies():
    for path in (ROOT / "kvprune").rglob("*.py"):
        assert "kvprune_strategies" not in path.read_text("utf-8"), path


def test_built_in_policies_decide_and_never_touch_what_holds_state():
    state = {"adapters", "cache", "engine", "session"}
    for path in (ROOT / "strategies").rglob("*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "kvprune":
                assert room(node.module) not in state, f"{path.name} imports {node.module}"


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
for name in kvprune.__all__:
    getattr(kvprune, name)
print(json.dumps([before == state(), "kvprune_strategies" in sys.modules, "sklearn" in sys.modules,
                  "matplotlib" in sys.modules, "typer" in sys.modules and "kvprune.cli" in sys.modules]))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == [True, False, False, False, False]


def loaded_by(code: str) -> set[str]:
    """Return the names of the modules that a fresh Python has loaded after some code."""
    code += "\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return set(json.loads(out))


def test_an_import_alone_loads_neither_torch_nor_any_room():
    loaded = loaded_by("import kvprune")
    assert not {"torch", "transformers", "einops", "pluggy"} & loaded
    assert {name for name in loaded if name.split(".")[0] == "kvprune"} == {"kvprune"}


def test_public_names_load_only_what_torch_and_the_caches_of_transformers_need():
    needed = loaded_by("import torch, transformers.cache_utils")
    loaded = loaded_by("import kvprune\nkvprune.compress, kvprune.CrossKVPolicy")
    roots = {name.split(".")[0] for name in loaded - needed} - set(sys.stdlib_module_names)
    assert roots <= {"kvprune", "einops", "pluggy"}


def promised_to_type_checkers() -> dict[str, str]:
    """Return each name under ``if TYPE_CHECKING`` of kvprune/__init__.py, and the module that defines it."""
    tree = ast.parse((ROOT / "kvprune" / "__init__.py").read_text("utf-8"))
    (block,) = (
        node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    found = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.name == alias.asname, f"{alias.name}: only `X as X` is exported to type checkers"
            found[alias.name] = str(node.module).removeprefix("kvprune").removeprefix(".")
    return found


def test_type_checkers_see_the_names_that_are_there():
    promised = promised_to_type_checkers()
    assert {name: module for name, module in promised.items() if module} == kvprune._NAMES
    assert tuple(sorted(name for name, module in promised.items() if not module)) == kvprune._MODULES


def test_each_public_name_comes_from_where_the_table_says():
    assert kvprune.__all__ == sorted({*kvprune._NAMES, "__version__", "errors", "scoring"})
    for name, module in kvprune._NAMES.items():
        home = importlib.import_module(f"kvprune.{module}")
        assert getattr(kvprune, name) is getattr(home, name)
        assert name in home.__all__, f"kvprune.{module} does not export {name}"
    for name in kvprune._MODULES:
        assert getattr(kvprune, name) is importlib.import_module(f"kvprune.{name}")
    assert {*kvprune.__all__, *kvprune._MODULES} <= set(dir(kvprune))  # all are loaded by now
    with pytest.raises(AttributeError, match="module 'kvprune' has no attribute 'compres'"):
        kvprune.compres  # noqa: B018


def test_names_come_after_a_bare_import():
    code = """
import kvprune
print(kvprune.errors.KVPruneError.__name__, kvprune.scoring.__name__, kvprune.testing.check_policy.__name__)
print(kvprune.demo.load.__name__, kvprune.session.registry.load.__name__)
from kvprune import *
print(compress.__name__, errors.__name__, Selection.__name__)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [
        "KVPruneError", "kvprune.scoring", "check_policy",
        "load", "load",
        "compress", "kvprune.errors", "Selection",
    ]  # fmt: skip


def test_what_dir_lists_needs_no_extra():
    loaded = loaded_by("import inspect, kvprune\ninspect.getmembers(kvprune)")
    assert "kvprune.testing" in loaded
    assert not {"kvprune.demo", "hypothesis", "matplotlib"} & loaded


def module_level_imports(nodes: list[ast.stmt]) -> set[str]:
    """Return the top-level packages that statements import when they run, not those for types."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.Try):
            found |= module_level_imports(node.body)
        elif isinstance(node, ast.If) and ast.unparse(node.test) != "TYPE_CHECKING":
            found |= module_level_imports([*node.body, *node.orelse])
    return found


def test_outside_the_demo_a_module_imports_only_what_the_plain_install_brings():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    brought = {re.split(r"[^\w-]", requirement)[0] for requirement in project["dependencies"]}
    allowed = brought | {"kvprune"} | set(sys.stdlib_module_names)
    for name, path in modules().items():
        if room(name) != "demo" and name != "kvprune.testing.strategies":  # these need extras
            assert module_level_imports(ast.parse(path.read_text("utf-8")).body) <= allowed, name


def test_only_our_packages_are_installed_whatever_lies_beside_them(tmp_path):
    """`kvprune compare` leaves a results folder in the checkout, and people keep copies there."""
    for folder in ("kvprune", "strategies"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("model", "__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "kvprune-results" / "data").mkdir(parents=True)
    shutil.copytree(tmp_path / "kvprune", tmp_path / "kvprune_old")
    shutil.copytree(tmp_path / "strategies" / "kvprune_strategies", tmp_path / "kvprune_strategies_old")
    (tmp_path / "kvprune" / "notes").mkdir()
    (tmp_path / "kvprune_empty").mkdir()
    # In a process of its own: setuptools must be imported before anything imports distutils.
    code = """
import json
from setuptools.config.pyprojecttoml import read_configuration
print(json.dumps(read_configuration("pyproject.toml", expand=True)["tool"]["setuptools"]["packages"]))
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    ours = {name for name, path in modules().items() if path.name == "__init__.py"}
    assert set(json.loads(run.stdout.splitlines()[-1])) == ours | {"kvprune_strategies"}


def test_nothing_generic_is_installed():
    code = "import importlib.metadata as m; print(m.distribution('kvprune').read_text('top_level.txt') or '')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert set(run.stdout.split()) == {"kvprune", "kvprune_strategies"}
    for name in ("strategies", "tests", "docs"):
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is not None)"
        assert subprocess.run([sys.executable, "-c", code], cwd="/", check=False).returncode == 0, name


def test_policies_are_found_from_any_directory(tmp_path):
    # None of the modules named second is needed before there is a model, and they take seconds to load.
    code = """
import sys
import kvprune
print(*kvprune.list_policies())
print("loaded:", *sorted({"torch._dynamo", "sympy", "transformers.modeling_utils"} & set(sys.modules)))
"""
    for folder in (tmp_path, ROOT):
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder
        )
        listed, loaded = run.stdout.splitlines()
        assert {"full", "lossless", "uniform", "random", "norm", "trim"} <= set(listed.split())
        assert loaded == "loaded:"
