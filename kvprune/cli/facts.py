"""What `list` and `cite` say about policies, without importing torch where that is possible.

The classes of policies say it, and importing them imports torch, which takes seconds. Our own are written
plainly, so where no plugin of others is installed, their source text is read instead. Nothing is written
twice: both ways read the same lines. Whatever is not as plain as expected is imported.
"""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from kvprune.cli.common import load_quietly
from kvprune.text import docstring

__all__ = ["Facts", "known_facts", "known_rules", "read_sources"]

_OWN = "kvprune"
_FACTS: Mapping[str, str | int] = {
    "name": "",
    "version": 1,
    "paper": "",
    "bibtex": "",
    "reads_answer": False,
}
"""Class attributes that are read, and what our base classes say of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a policy's class says.

    Attributes:
        name: Its name in specs.
        version: Its version.
        origin: The plugin that provides it, and in parentheses the distribution.
        text: Its docstring.
        paper: Where the method comes from, or "".
        bibtex: The entry of that paper, or "".
        is_reference: Whether it reads the answer, and is no method.
    """

    name: str
    version: int
    origin: str
    text: str
    paper: str
    bibtex: str
    is_reference: bool = False


def known_facts() -> tuple[dict[str, Facts], tuple[str, ...]]:
    """Return the facts of all installed policies by name, and a line for each broken plugin."""
    if (own := read_sources()) is not None:
        return own, ()
    found = load_quietly()
    facts = {
        entry.name: Facts(
            name=entry.name,
            version=entry.version,
            origin=f"{entry.plugin} ({entry.distribution})",
            text=docstring(entry.cls),
            paper=entry.cls.paper,
            bibtex=entry.cls.bibtex,
            is_reference=entry.cls.reads_answer,
        )
        for entry in found.policies.values()
    }
    broken = (f"broken plugin {one.name} ({one.distribution}): {one.problem}" for one in found.broken)
    return facts, tuple(broken)


def known_rules() -> list[Facts]:
    """Return the facts of all installed rules of `kvprune.contrast`."""
    if read_sources() is not None:
        spec = importlib.util.find_spec("kvprune")  # which is loaded; its rooms are not
        if spec is not None and spec.origin is not None:
            source = Path(spec.origin).parent / "session" / "contrast_rules.py"
            tree = ast.parse(source.read_text("utf-8"))
            names = [cls.name for cls in tree.body if isinstance(cls, ast.ClassDef) and _is_rule(cls)]
            return [_of_class(tree, name, f"{_OWN} ({_OWN})", check_bases=False) for name in names]
    return [
        Facts(
            name=entry.name,
            version=1,
            origin=f"{entry.plugin} ({entry.distribution})",
            text=docstring(entry.cls),
            paper=entry.cls.paper,
            bibtex=entry.cls.bibtex,
        )
        for entry in load_quietly().rules.values()
    ]


def _is_rule(cls: ast.ClassDef) -> bool:
    return any(isinstance(base, ast.Name) and base.id == "CombineRule" for base in cls.bases)


def read_sources() -> dict[str, Facts] | None:
    """Return the facts of our own policies by name, sorted, read from their source files.

    Returns:
        None if they must be imported: a plugin of others is installed, or ``KVPRUNE_PLUGINS`` chooses, or a
        class is not written as plainly as ours are.
    """
    if "KVPRUNE_PLUGINS" in os.environ:
        return None
    try:
        found = [facts for plugin, package in _own_plugins() for facts in _of_package(plugin, package)]
    except Exception:  # anything unexpected is for the import to find out, which says what is wrong
        return None
    by_name = {facts.name: facts for facts in found}
    return dict(sorted(by_name.items())) if found and len(by_name) == len(found) else None


class _NotPlain(Exception):  # noqa: N818  no error: the caller goes another way
    """The source does not say it in a way that can be read without running it."""


def _own_plugins() -> Iterator[tuple[str, str]]:
    """Yield name and package of each of our plugins; raise if there is one of others."""
    for entry_point in metadata.entry_points(group="kvprune"):
        if entry_point.dist is None or entry_point.dist.name != _OWN:
            raise _NotPlain
        if "." not in entry_point.value:  # finding a module in a package would import that package
            yield entry_point.name, entry_point.value
        elif not entry_point.value.startswith(f"{_OWN}."):  # the package itself provides adapters only
            raise _NotPlain


def _of_package(plugin: str, package: str) -> Iterator[Facts]:
    """Yield the facts of each class that a package imports from its own modules."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise _NotPlain
    top = Path(spec.origin)
    for node in ast.parse(top.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(f"{package}."):
            _, _, module = str(node.module).partition(".")
            tree = ast.parse((top.parent / f"{module}.py").read_text("utf-8"))
            for imported in node.names:
                yield _of_class(tree, imported.name, f"{plugin} ({_OWN})")


def _of_class(tree: ast.Module, name: str, origin: str, *, check_bases: bool = True) -> Facts:
    (cls,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    if check_bases and not all(_is_ours(base, tree) for base in cls.bases):  # its facts may be inherited
        raise _NotPlain
    said = dict(_FACTS)
    for statement in cls.body:
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                if isinstance(target, ast.Name) and target.id in said:
                    said[target.id] = ast.literal_eval(statement.value)
        elif not isinstance(statement, ast.AnnAssign | ast.FunctionDef | ast.Expr):
            raise _NotPlain
    texts = {fact: value for fact, value in said.items() if isinstance(value, str)}
    version = said["version"]
    if not isinstance(version, int) or not texts["name"]:
        raise _NotPlain
    return Facts(
        name=texts["name"],
        version=version,
        origin=origin,
        text=ast.get_docstring(cls) or "",
        paper=texts["paper"],
        bibtex=texts["bibtex"],
        is_reference=bool(said["reads_answer"]),
    )


def _is_ours(base: ast.expr, tree: ast.Module) -> bool:
    """Whether a base class is one of the framework's, which state no facts of a method."""
    if not isinstance(base, ast.Name):
        return False
    return any(
        isinstance(node, ast.ImportFrom)
        and f"{node.module}.".startswith(f"{_OWN}.")
        and any((one.asname or one.name) == base.id for one in node.names)
        for node in tree.body
    )
