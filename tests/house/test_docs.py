"""The documents say what the code does: examples run, names and links exist, nothing is left out."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest
import torch
from evidence.numbers import from_json
from evidence.wording import percent
from generation import generate, mllama
from kvprune_strategies import kvprune_policies
from repository import place_of
from test_house import ROOMS

import kvprune
from kvprune import errors
from kvprune.session import hookspecs
from kvprune.session.rules import get_rule
from kvprune.testing import mllama_inputs

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("docs/*.md")), ROOT / "README.md"]
DOCS = {path.name: path.read_text("utf-8") for path in PAGES}
DOORS = {
    "kvprune",
    "kvprune.adapters",
    "kvprune.adapters.encoder_decoder",
    "kvprune.comparison",
    "kvprune.demo",
    "kvprune.policy",
    "kvprune.scoring",
    "kvprune.testing",
}
"""Where documents import from. What is not among these may move without a word in the changelog."""

DOCUMENTED = (Path(__file__).parent / "documented_names.txt").read_text("utf-8").split()
"""Every module and dotted name that the documents named before the code moved into rooms."""


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
    files = ("test_invariants.py", "test_step_invariants.py")
    tests = "".join((ROOT / "tests/engine" / name).read_text("utf-8") for name in files)
    for number in range(1, 18):
        assert re.search(rf"^\| KV{number:02d} ", DOCS["invariants.md"], re.MULTILINE)
        assert f"def test_kv{number:02d}_" in tests


def test_every_hook_is_documented():
    for hook in ("kvprune_policies", "kvprune_adapters", "kvprune_combine_rules"):
        assert hasattr(hookspecs, hook)
        assert f"### `{hook}()`" in DOCS["hooks.md"]


def test_every_policy_is_in_the_readme():
    for name in ("full", "lossless", "uniform", "random", "norm", "trim"):
        assert name in kvprune.list_policies()
        assert f"`{name}`" in DOCS["README.md"]


def test_every_built_in_policy_is_in_the_map_of_policies_and_counted():
    head, _, _ = DOCS["policies.md"].partition("<!-- generated")
    names = {policy.name for policy in kvprune_policies()}
    assert names <= set(re.findall(r"`([\w-]+)`", head.partition("| reference")[2]))
    assert f"one of the {len(names)} [built-in policies]" in DOCS["README.md"]


def test_each_system_of_the_paper_has_a_name_that_runs():
    _, _, rest = DOCS["policies.md"].partition("## Trimmed Llama and the ten systems")
    rows = [row for row in rest.partition("\n## ")[0].splitlines() if re.search(r"\| \d{4}\.\d{5} \|", row)]
    assert len(rows) == 11
    papers = {policy.name: policy.paper for policy in kvprune_policies()}
    for row in rows:
        _, _, number, here, _, _ = (cell.strip() for cell in row.split("|"))
        rule = re.search(r"the rule `(\w+)`", here)
        if rule is None:
            assert number in papers[here.strip("`")], row
        else:
            assert number in str(type(get_rule(rule[1])).__doc__), row


def test_errors_named_in_documents_exist():
    named = set(re.findall(r"`(\w+Error)`", "\n".join(DOCS.values())))
    assert named
    assert named <= set(errors.__all__)


def links(path: Path) -> list[tuple[Path, str]]:
    """Return the file and the anchor ("" for none) of each link of a page to a file of the repository."""
    found = re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", path.read_text("utf-8"))
    return [((path.parent / target).resolve() if target else path, anchor) for target, anchor in found]


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target, anchor in links(path):
        assert target.exists(), f"{path.name} links to {target}"
        if anchor:
            assert anchor in anchors(target.read_text("utf-8")), (
                f"{path.name} links to {target.name}#{anchor}"
            )


def test_every_page_is_reachable_from_the_readme():
    reached, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        if page not in reached:
            reached.add(page)
            ahead += [target for target, _ in links(page) if target.suffix == ".md"]
    assert reached == set(PAGES)


def test_the_readme_is_one_page():
    assert (ROOT / "README.md").stat().st_size < 9000


def test_the_readme_has_the_commands_that_ci_runs():
    commands = re.findall(r"<!-- ci: (\w+) -->\n```\n(.+)\n```\n", DOCS["README.md"])
    assert [name for name, _ in commands] == ["compare", "tests"]
    assert commands[0][1].endswith(".venv/bin/kvprune compare")
    assert commands[1][1].endswith(".venv/bin/pytest -q")


def test_results_in_the_readme_are_those_of_the_evidence():
    sets = from_json((ROOT / "docs" / "evidence.json").read_text("utf-8"))
    rows = re.findall(r"^\| `([\w:=]+)`[^|]*\|[^|]*((?:\| [\d.]+ ){4})\|$", DOCS["README.md"], re.MULTILINE)
    assert 8 <= len(rows) <= 10
    for name, cells in rows:
        found = []
        for key, more in (("demo", "demo"), ("synthetic", "synthetic-newer")):
            assert sets[key].questions_digest == sets[more].questions_digest
            for ratio in (0.25, 0.1):
                at = sets[more].at(ratio) | sets[key].at(ratio)
                label = name if name in at else f"{name}:reach=onward"
                found.append(percent((sets[key].full if name == "full" else at[label]).rate.value))
        assert found == cells.replace("|", " ").split(), name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_documents_import_from_the_documented_doors(path):
    for code in re.findall(r"^```python\n(.*?)^```", path.read_text("utf-8"), re.DOTALL | re.MULTILINE):
        for line in code.splitlines():
            if not line.startswith(("import kvprune", "from kvprune")):
                continue
            (node,) = ast.parse(line).body
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
            for module in modules:
                if module.partition(".")[0] == "kvprune":
                    assert module in DOORS, f"{path.name}: {line}"


@pytest.mark.parametrize(
    "path", [path for path in PAGES if path.name != "changelog.md"], ids=lambda path: path.name
)
def test_names_and_files_in_documents_exist(path):
    text = path.read_text("utf-8")
    for name in sorted(set(re.findall(r"(?<![\w./-])kvprune(?:\.[A-Za-z_]\w*)+", text))):
        assert exists(name), f"{path.name} names {name}"
    for file in sorted(set(re.findall(r"(?<![\w./])(?:kvprune|strategies|tests|docs)/[\w./-]*\w/?", text))):
        if not re.search(r"NAME|FAMILY", file):
            assert place_of(file).exists(), f"{path.name} names {file}"


def test_the_map_has_every_room_in_order():
    drawing = re.search(r"## The rooms\n\n```\n(.*?)```", DOCS["contributing.md"], re.DOTALL)[1]
    drawn = re.findall(r"^  (\w+)  ", drawing, re.MULTILINE)
    assert drawn == [*reversed(ROOMS)]
    for tests in re.findall(r"tests/\w+", drawing):
        assert (ROOT / tests).is_dir(), tests


def exists(name: str) -> bool:
    """Whether a dotted name leads to a module, or to something in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def moved() -> dict[str, list[str]]:
    """Return what the changelog's table says: names before, each with the names now."""
    table = DOCS["changelog.md"].partition("| before | now |")[2].partition("\n\n")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines()[2:]]
    return {re.findall(r"`([\w.]+)`", before)[0]: re.findall(r"`([\w.]+)`", now) for before, now in rows}


def successors(name: str) -> list[str]:
    """Return where the changelog says that a name went: its own row, or that of the module around it."""
    table, rest = moved(), ""
    while name not in table:
        name, dot, last = name.rpartition(".")
        if not dot:
            return []
        rest = f".{last}{rest}"
    return [one + rest for one in table[name]]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_what_was_documented_still_imports_or_the_changelog_says_where_it_is(name):
    if not exists(name):
        assert any(map(exists, successors(name))), f"{name} is gone: add it to the table in docs/changelog.md"


@pytest.mark.parametrize(("before", "now"), moved().items(), ids=moved())
def test_what_the_changelog_sends_readers_to_exists(before, now):
    assert now
    for name in now:
        assert exists(name), f"{before} is said to be {name} now"


def test_the_quickstart_runs():
    code = re.search(
        r"```python\n(import kvprune\nfrom kvprune import demo.*?)```", DOCS["quickstart.md"], re.DOTALL
    )[1]
    space: dict[str, object] = {}
    torch.manual_seed(0)
    exec(compile(code, "quickstart.md", "exec"), space)
    assert space["run"].report.kept_fraction == pytest.approx(0.25, abs=0.02)
