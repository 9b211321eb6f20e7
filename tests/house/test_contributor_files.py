"""Forms, workflow and hooks for contributors are valid, and agree with pyproject.toml and contributing.md."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from repository import place_of

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
FORMS = [path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
FIELDS = {"checkboxes", "dropdown", "input", "markdown", "textarea"}


def read(name: str | Path) -> dict[object, object]:
    return yaml.safe_load((ROOT / name).read_text("utf-8"))


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.name)
def test_issue_forms_have_what_github_asks_for(form):
    content = read(form)
    assert {"name", "description", "body"} <= set(content)
    assert {field["type"] for field in content["body"]} <= FIELDS
    asked = [field for field in content["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in asked}) == len(asked)
    for field in asked:
        assert field["attributes"]["label"]
        if field["type"] in ("checkboxes", "dropdown"):
            assert field["attributes"]["options"]
    assert any(field.get("validations", {}).get("required") for field in asked)


def test_there_are_forms_for_a_policy_and_for_a_family():
    assert {"new-policy.yml", "new-family.yml"} <= {form.name for form in FORMS}
    assert read(".github/ISSUE_TEMPLATE/config.yml") == {"blank_issues_enabled": True}


def test_the_workflow_runs_what_contributors_run_on_both_ends_of_python():
    workflow = read(".github/workflows/ci.yml")
    job = workflow["jobs"]["tests"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    lowest, newest = job["strategy"]["matrix"]["python"]
    assert PROJECT["requires-python"] == f">={lowest}"
    assert tuple(map(int, newest.split("."))) > tuple(map(int, lowest.split(".")))


def test_the_hooks_of_each_commit_are_tools_of_the_dev_extra():
    hooks = [hook for repo in read(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert {"ruff-check", "ruff-format", "mypy", "end-of-file-fixer", "house"} <= {
        hook["id"] for hook in hooks
    }
    (house,) = (hook for hook in hooks if hook["id"] == "house")
    assert (ROOT / house["entry"].split()[-1]).is_file()


def test_the_citation_has_the_version_of_the_package():
    citation = read("CITATION.cff")
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])


def test_the_pull_request_form_names_files_that_contributing_names():
    form = (ROOT / ".github/pull_request_template.md").read_text("utf-8")
    page = (ROOT / "docs/contributing.md").read_text("utf-8")
    assert re.findall(r"^\*\*(A .*|An .*)\*\*$", form, re.MULTILINE) == re.findall(
        r"^\*\*(An? [^.]*)\*\*$", page, re.MULTILINE
    )
    for file in re.findall(r"`((?:kvprune|strategies|tests|docs)/[\w./]*)`", form):
        assert place_of(file).exists(), file
