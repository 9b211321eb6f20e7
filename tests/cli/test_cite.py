"""What to cite: BibTeX of policies and of kvprune."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import kvprune
from kvprune.cli import app
from kvprune.cli.cite import own_bibtex
from kvprune.session import registry

POLICIES = registry.load().policies
CFF = yaml.safe_load((Path(__file__).parents[2] / "CITATION.cff").read_text("utf-8"))


def read_bibtex(text: str) -> dict[str, str]:
    """Return the fields of one entry, its key as "key": braces are counted, as BibTeX does."""
    head = re.fullmatch(r"\s*@(\w+)\{([\w-]+),(.*)\}\s*", text, re.DOTALL)
    assert head, f"no BibTeX entry: {text!r}"
    fields, rest = {"type": head[1], "key": head[2]}, head[3].strip()
    while rest:
        name = re.match(r"(\w+)\s*=\s*\{", rest)
        assert name, f"no field: {rest!r}"
        depth, end = 1, name.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(rest[end], 0)
            end += 1
        assert name[1] not in fields, f"twice: {name[1]}"
        fields[name[1]] = rest[name.end() : end - 1]
        rest = rest[end:].lstrip().removeprefix(",").lstrip()
    return fields


def cite(*names: str) -> Any:
    return CliRunner().invoke(app, ["cite", *names])


@pytest.mark.parametrize("name", [name for name, entry in POLICIES.items() if entry.cls.paper])
def test_every_policy_with_a_paper_has_an_entry_of_that_paper(name: str) -> None:
    policy = POLICIES[name].cls
    fields = read_bibtex(policy.bibtex)
    assert fields["eprint"] in policy.paper
    assert fields["archivePrefix"] == "arXiv"
    assert fields["title"]
    assert fields["author"]
    assert fields["key"] == f"{name}{fields['year']}"
    assert re.fullmatch(r"20\d\d", fields["year"])
    assert not {"booktitle", "journal", "pages"} & set(fields), "venues would have to be checked"


def test_cite_prints_entries_once_in_the_order_asked() -> None:
    done = cite("norm", "trim", "norm", "kvprune")
    assert done.exit_code == 0
    keys = re.findall(r"^@\w+\{([^,]+),", done.stdout, re.MULTILINE)
    assert keys == ["norm2024", "trim2025", "kvprune"]


def test_policies_without_a_paper_say_what_to_cite() -> None:
    done = cite("trim", "uniform")
    assert done.exit_code == 2
    assert done.stdout == "", "nothing is cited where something is missing"
    assert "policy 'uniform' has no paper of its own" in done.stderr
    assert "kvprune cite kvprune" in done.stderr
    assert "did you mean 'trim'" in cite("trimm").stderr
    reference = cite("answer-attention").stderr
    assert "'answer-attention' is a reference, not a method, and has no paper of its own" in reference


def test_a_paper_without_an_entry_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(POLICIES["trim"].cls, "bibtex", " ")
    monkeypatch.setattr("kvprune.cli.facts.read_sources", lambda: None)  # or it would read the file
    done = cite("trim")
    assert done.exit_code == 2
    assert "brings no BibTeX entry; cite its paper by hand: arXiv 2504.00557" in done.stderr


def test_show_leads_to_cite() -> None:
    runner = CliRunner()
    assert "cite:     kvprune cite trim\n" in runner.invoke(app, ["show", "trim"]).stdout
    assert "cite:" not in runner.invoke(app, ["show", "uniform"]).stdout


def test_kvprune_is_cited_as_its_citation_file_says() -> None:
    fields = read_bibtex(own_bibtex())
    assert re.sub("[{}]", "", fields["title"]) == CFF["title"]
    assert re.sub("[{}]", "", fields["author"]) == CFF["authors"][0]["name"]
    assert fields["year"] == CFF["date-released"][:4]
    assert fields["version"] == CFF["version"] == metadata.version("kvprune")


def test_the_papers_of_the_citation_file_are_those_of_policies() -> None:
    known = [read_bibtex(entry.cls.bibtex) for entry in POLICIES.values() if entry.cls.bibtex]
    for reference in CFF["references"]:
        (entry,) = (one for one in known if reference["url"].endswith(one["eprint"]))
        assert re.sub("[{}]", "", entry["title"]) == reference["title"]
        names = [f"{one['family-names']}, {one['given-names']}" for one in reference["authors"]]
        assert re.split(r"\s+and\s+", entry["author"]) == names


def test_bibtex_must_be_text() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Wrong(kvprune.CrossKVPolicy):
        """Has no text there."""

        name = "wrong"
        bibtex = None  # type: ignore[assignment]

        def select(self, view: kvprune.LayerView) -> kvprune.Decision:
            return kvprune.Decision()

    with pytest.raises(TypeError, match="has the bibtex None; it is text, or empty"):
        Wrong()
