"""What list and cite read from source text is what the imported classes say, or else they are imported."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from kvprune.cli import facts
from kvprune.session import registry
from kvprune.text import docstring

PLAIN = '''
from kvprune import ScoringPolicy

class Mine(ScoringPolicy):
    """Ranks."""

    size: int = 3
    name = "mine"
    paper = "a paper"

    def score(self, view):
        return view.values
'''


def test_source_texts_say_what_the_classes_say() -> None:
    read = facts.read_sources()
    assert read is not None
    installed = registry.load().policies
    assert list(read) == list(installed)
    for name, entry in installed.items():
        said, cls = read[name], entry.cls
        assert (said.name, said.version, said.paper, said.bibtex) == (
            name,
            cls.version,
            cls.paper,
            cls.bibtex,
        )
        assert said.text == docstring(cls)
        assert said.is_reference is cls.reads_answer
        assert said.origin == f"{entry.plugin} ({entry.distribution})"
    imported, _ = known_by_import()
    assert imported == read


def known_by_import() -> tuple[dict[str, facts.Facts], tuple[str, ...]]:
    """Return what is known if nothing is read from source text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(facts, "read_sources", lambda: None)
        return facts.known_facts()


class Distribution:
    """Stands for an installed distribution."""

    def __init__(self, name: str) -> None:
        self.name = name


def install(patch: pytest.MonkeyPatch, package: str, distribution: str) -> None:
    """Install one plugin, and no other."""
    entry_point = metadata.EntryPoint("builtin", package, "kvprune")
    vars(entry_point)["dist"] = Distribution(distribution)
    patch.setattr(metadata, "entry_points", lambda group: [entry_point])


def package_of(folder: Path, patch: pytest.MonkeyPatch, source: str, distribution: str = "kvprune") -> None:
    """Install a package that imports one class from one module."""
    package = folder / "facts_package"
    package.mkdir()
    (package / "__init__.py").write_text("from facts_package.mine import Mine as Mine\n", "utf-8")
    (package / "mine.py").write_text(source, "utf-8")
    patch.syspath_prepend(str(folder))
    install(patch, "facts_package", distribution)


def test_a_plain_class_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package_of(tmp_path, monkeypatch, PLAIN)
    assert facts.read_sources() == {
        "mine": facts.Facts(
            name="mine", version=1, origin="builtin (kvprune)", text="Ranks.", paper="a paper", bibtex=""
        )
    }


def test_plugins_of_others_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package_of(tmp_path, monkeypatch, PLAIN, distribution="acme")
    assert facts.read_sources() is None


def test_a_choice_of_plugins_is_left_to_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registry.PLUGINS_VARIABLE, "")
    assert facts.read_sources() is None


def test_damaged_metadata_is_left_to_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(group: str) -> None:
        raise KeyError(group)

    monkeypatch.setattr(metadata, "entry_points", damaged)
    assert facts.read_sources() is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("class Mine(ScoringPolicy):", "class Mine(Other):"),
        ("class Mine(ScoringPolicy):", "class Mine(kvprune.ScoringPolicy):"),
        ('name = "mine"', 'name = f"{1}mine"'),
        ('name = "mine"', 'name = "mi" "ne".upper()'),
        ('name = "mine"', ""),
        ('paper = "a paper"', "paper = PAPER"),
        ('paper = "a paper"', "paper = 7"),
        ('paper = "a paper"', "if True:\n        paper = 'a paper'"),
        ("class Mine", "class Yours"),
        ("class Mine", "class"),
    ],
)
def test_what_is_not_plain_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    assert old in PLAIN
    package_of(tmp_path, monkeypatch, PLAIN.replace(old, new))
    assert facts.read_sources() is None
