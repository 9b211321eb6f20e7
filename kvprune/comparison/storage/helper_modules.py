"""Which files of its own package a policy's module imports: what else can change its decisions.

Files are read and never run: imports are found in the text, also those inside of functions.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

__all__ = ["helper_files"]


def helper_files(module: str, file: Path) -> list[Path]:
    """Return the files of a module's own package that it imports, directly or through others of them.

    They are sorted by the names of their modules; the file itself is left out. Of a package, only what is
    named counts: ``from package import helper`` is the file ``package/helper.py``, or where there is none,
    ``package/__init__.py``. A module that belongs to no package has no helpers.

    Args:
        module: Full name of the module, such as ``package.policy``.
        file: Its source.
    """
    is_package = file.name == "__init__.py"
    if "." not in module and not is_package:
        return []
    above = file.resolve().parents
    up = module.count(".") + is_package
    if up >= len(above) or _file_of(above[up], module) != file.resolve():
        return []  # loaded under a name that its place does not have
    root = above[up]
    found, left = {module: file}, [module]
    while left:
        importer = left.pop()
        for name in _imported(root, importer, found[importer]):
            path = _file_of(root, name)
            if path is not None and name not in found:
                found[name] = path
                left.append(name)
    del found[module]
    return [found[name] for name in sorted(found)]


def _imported(root: Path, importer: str, file: Path) -> Iterator[str]:
    """Yield the modules of the importer's own top-level package that its source names."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # it was edited since it was imported
        return
    top = importer.partition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names if one.name.partition(".")[0] == top)
        if isinstance(node, ast.ImportFrom):
            origin = _origin(importer, file, node)
            for one in node.names if origin.partition(".")[0] == top else ():
                inner = f"{origin}.{one.name}"
                yield origin if _file_of(root, inner) is None else inner


def _origin(importer: str, file: Path, node: ast.ImportFrom) -> str:
    """Return the full name after ``from``; "" if it lies outside of the package."""
    if not node.level:
        return node.module or ""
    steps = importer.split(".")
    up = node.level - (file.name == "__init__.py")
    return ".".join([*steps[: len(steps) - up], *([node.module] if node.module else [])])


def _file_of(root: Path, module: str) -> Path | None:
    """Return the source of a module under the folder of its top-level package; None if there is none."""
    place = root.joinpath(*module.split("."))
    files = (place / "__init__.py", place.with_name(f"{place.name}.py"))
    return next((file for file in files if file.is_file()), None)
