"""An edit of kvprune makes answers old, or does not, as the table in docs/results-folder.md says."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib
import inspect
import itertools
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from comparison_helpers import answer, build_grid, example, write_folder

import kvprune
from kvprune.comparison.plan.grid import Configuration, expand
from kvprune.comparison.storage import code_digest as module
from kvprune.comparison.storage.answer_lines import current
from kvprune.comparison.storage.code_digest import CODE, code_digest, covered_files, find_part
from kvprune.comparison.storage.growth import grow
from kvprune.comparison.storage.helper_modules import helper_files
from kvprune.comparison.storage.identity import policy_identities
from kvprune.comparison.storage.recorded_grid import RecordedGrid
from kvprune.comparison.storage.results_folder import ResultsFolder
from kvprune.policy import CrossKVPolicy

PACKAGE = Path(kvprune.__file__).parent
PAGE = (Path(__file__).parents[2] / "docs" / "results-folder.md").read_text("utf-8")
SECTION = PAGE.split("## What a results folder depends on")[1].split("\n## ")[0]
DOCUMENTED = re.findall(r"^\| `([^`]+)` \| (yes|no) \| (.+) \|$", SECTION, re.MULTILINE)


BASE_POLICY = """
from dataclasses import dataclass
from kvprune import ScoringPolicy

@dataclass(frozen=True, kw_only=True)
class Base(ScoringPolicy):
    name = "base"
    version = 1

    def score(self, view):
        return view.values.float().norm(dim=-1)
"""
OWN_POLICY = """
from dataclasses import dataclass
from base_policy import Base

@dataclass(frozen=True, kw_only=True)
class Own(Base):
    name = "own"
"""


def files() -> list[str]:
    return sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package's Python files, whose digest manifests hold instead of the real one."""
    for file in files():
        target = tmp_path / "kvprune" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PACKAGE / file, target)
    monkeypatch.setattr(module, "PACKAGE", tmp_path / "kvprune")
    return tmp_path / "kvprune"


def grid(configurations: tuple[Configuration, ...]) -> RecordedGrid:
    return build_grid(configurations, [example(0)])


def edit(file: Path) -> None:
    file.write_text(file.read_text("utf-8") + "\n# one more line\n", encoding="utf-8")


def test_the_table_of_the_page_is_that_of_the_code() -> None:
    assert [(part.path, "yes" if part.covered else "no", part.reason) for part in CODE] == DOCUMENTED


def test_every_file_belongs_to_exactly_one_entry_and_every_entry_has_files() -> None:
    used = set()
    for file in files():
        (one,) = [part.path for part in CODE if file == part.path or file.startswith(part.path)]
        used.add(one)
        assert find_part(file).path == one
    assert used == {part.path for part in CODE}, "an entry without files"


@pytest.mark.parametrize(("path", "counts", "_"), DOCUMENTED, ids=[path for path, *_ in DOCUMENTED])
def test_an_edit_makes_answers_old_or_not_as_the_page_says(
    path: str,
    counts: str,
    _: str,
    copy: Path,
    tmp_path: Path,
    configurations: tuple[Configuration, ...],
) -> None:
    before = grid(configurations)
    write_folder(tmp_path / "out", before, [answer("full", example(0), "7")])
    edited = sorted((copy / path).rglob("*.py")) if path.endswith("/") else [copy / path]
    whole = code_digest(copy)
    for file in edited:
        text = file.read_text("utf-8")
        edit(file)
        assert (code_digest(copy) != whole) == (counts == "yes"), file
        if file is not edited[-1]:
            file.write_text(text, encoding="utf-8")
    after = grid(configurations)
    with ResultsFolder(tmp_path / "out") as folder:
        growth = grow(before, after, available=after.digests, answered={"e0"}, former=(), form=lambda _: [])
        earlier = [] if growth.replaced is None else [growth.replaced]
        answers, old = current("r", folder.answers(), after, earlier)
    if counts == "yes":
        assert not answers
        ((reason, _count),) = old.items()
        assert reason.startswith("kvprune_source_sha256 was ")
        assert reason.endswith(": the code of kvprune has changed since")
    else:
        assert list(answers) == [("full", None, "e0")]
        assert not old


@pytest.mark.parametrize("file", ["wing/new.py", "comparison/wing/new.py", "comparison/new.py", "new.py"])
def test_what_has_no_entry_counts(copy: Path, file: str) -> None:
    before = code_digest()
    (copy / file).parent.mkdir(exist_ok=True)
    (copy / file).write_text("")
    assert find_part(file) is None
    assert code_digest() != before


def test_a_moved_or_missing_file_counts(copy: Path) -> None:
    before = code_digest()
    (copy / "engine" / "report.py").rename(copy / "engine" / "reports.py")
    moved = code_digest()
    (copy / "engine" / "reports.py").unlink()
    assert len({before, moved, code_digest()}) == 3


def test_the_running_package_is_what_is_digested() -> None:
    covered = {path.relative_to(PACKAGE).as_posix() for path in covered_files()}
    assert covered <= set(files())
    assert {"tokens/selection.py", "engine/manager.py", "comparison/execution/generation.py"} <= covered
    assert grid(expand([], [1.0])).context["kvprune_source_sha256"] == code_digest(PACKAGE)


def test_what_counts_imports_nothing_that_does_not_count_but_could_compute() -> None:
    harmless = {
        "errors.py",
        "text.py",
        "__init__.py",  # `from kvprune import demo`
        "comparison/statistics/",  # called with finished answers,
        "comparison/display/",  # and so is the figure
    }
    for path in covered_files():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "kvprune":
                parts = node.module.split(".")[1:]
                target = PACKAGE.joinpath(*parts)
                file = target / "__init__.py" if target.is_dir() else target.with_suffix(".py")
                part = find_part(file.relative_to(PACKAGE).as_posix())
                assert part.covered or part.path in harmless, f"{path.name} imports {node.module}"


def test_a_policy_has_the_digest_of_the_classes_it_extends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base_policy.py").write_text(BASE_POLICY)
    (tmp_path / "own_policy.py").write_text(OWN_POLICY)
    monkeypatch.syspath_prepend(str(tmp_path))
    from own_policy import Own

    def digests() -> list[str]:
        given = dataclasses.replace(expand([], [1.0])[0], policy=Own(keep_ratio=0.5), spec="own")
        identities = policy_identities((*expand(["norm:keep_ratio=0.5"], []), given))
        return [one["source_sha256"] for one in identities]

    before = digests()
    edit(tmp_path / "base_policy.py")
    after = digests()
    assert before[:2] == after[:2], "policies that do not extend it"
    assert before[2] != after[2]


HELPED = {
    "__init__.py": "from .policy import Own\nfrom .unused import x\n",
    "policy.py": "from mine import helper\nfrom mine.inner import deep\n"
    + BASE_POLICY.replace("Base", "Own"),
    "helper.py": "from . import further as other\nimport json\n",
    "further.py": "x = 1\n",
    "inner/__init__.py": "import mine.unused\nx = 1\n",
    "inner/deep.py": "def late():\n    from ..lazy import y\n",
    "lazy.py": "raise SystemExit('whoever imports this is wrong')\n",
    "unused.py": "x = 1\n",
}
COVERED = ["further.py", "helper.py", "deep.py", "lazy.py"]


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with a policy and modules that it imports, first on the path."""
    for name, text in HELPED.items():
        path = tmp_path / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "mine"
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]


def source_of(policy: CrossKVPolicy) -> str:
    (one,) = policy_identities([dataclasses.replace(expand([], [1.0])[0], policy=policy)])
    return one["source_sha256"]


def test_a_policy_has_the_digest_of_the_modules_of_its_package_that_it_imports(mine: Path) -> None:
    policy = importlib.import_module("mine.policy").Own(keep_ratio=0.5)
    assert [path.name for path in helper_files("mine.policy", mine / "policy.py")] == COVERED
    found = [source_of(policy)]
    assert found[0] == source_of(policy)
    for name in HELPED:
        edit(mine / name)
        found.append(source_of(policy))
    changed = [name for name, (old, new) in zip(HELPED, itertools.pairwise(found), strict=True) if old != new]
    assert changed == ["policy.py", "helper.py", "further.py", "inner/deep.py", "lazy.py"]


def test_the_digest_does_not_depend_on_where_a_package_lies(mine: Path, tmp_path: Path) -> None:
    there = shutil.copytree(mine, tmp_path / "elsewhere" / "mine")
    names = [path.relative_to(mine) for path in helper_files("mine.policy", mine / "policy.py")]
    again = helper_files("mine.policy", there / "policy.py")
    assert [path.relative_to(there) for path in again] == names
    assert helper_files("other.name.policy", mine / "policy.py") == []


def test_helpers_of_the_built_in_policies_are_covered() -> None:
    covered = {
        name: [path.stem for path in helper_files(cls.__module__, Path(inspect.getsourcefile(cls)))]
        for name in kvprune.list_policies()
        for cls in [type(kvprune.get_policy(name))]
    }
    assert covered["attnpred"] == ["attention_blocks", "attention_predictors"]
    assert (covered["quecc"], covered["vatp"], covered["norm"]) == (["cells"], ["first_tokens"], [])


def test_a_policy_in_one_file_has_the_digest_of_that_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lonely_policy.py").write_text(BASE_POLICY)
    monkeypatch.syspath_prepend(str(tmp_path))
    policy = importlib.import_module("lonely_policy").Base(keep_ratio=0.5)
    assert source_of(policy) == hashlib.sha256(BASE_POLICY.encode()).hexdigest()
