"""Finds, in the source of the installed transformers, which classes build an ``EncoderDecoderCache``."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

_CACHE = "EncoderDecoderCache"


@functools.cache
def caching_classes() -> dict[str, tuple[str, ...]]:
    """Return the public model classes that lead to an ``EncoderDecoderCache``, by who builds it.

    Keys are classes whose own code builds one, such as ``BartDecoder``. Values are the public classes of the
    same file that use that class, directly or through others, such as ``BartForConditionalGeneration``; the
    class itself is among them if it is public.
    """
    import transformers

    found: dict[str, tuple[str, ...]] = {}
    models = Path(transformers.__file__).parent / "models"
    for file in sorted(models.glob("*/modeling_*.py")):
        text = file.read_text("utf-8")
        if f"{_CACHE}(" in text:
            tree = ast.parse(text)
            for builder in _builders(tree):
                found[builder] = tuple(_users(tree, builder))
    return found


def _classes(tree: ast.Module) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _builders(tree: ast.Module) -> Iterator[str]:
    """Yield the classes that call ``EncoderDecoderCache``."""
    for name, node in _classes(tree).items():
        calls = (part.func for part in ast.walk(node) if isinstance(part, ast.Call))
        if any(isinstance(func, ast.Name) and func.id == _CACHE for func in calls):
            yield name


def _users(tree: ast.Module, builder: str) -> Iterator[str]:
    """Yield the public model classes whose code names a class, directly or through classes that it names."""
    classes = _classes(tree)
    names = {
        name: {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} & classes.keys()
        for name, node in classes.items()
    }
    using = {builder}
    while more := {name for name, named in names.items() if name not in using and named & using}:
        using |= more
    public = {text for text in _exported(tree) if not text.endswith("PreTrainedModel")}
    yield from (name for name in classes if name in using & public)


def _exported(tree: ast.Module) -> set[str]:
    """Return the names in ``__all__``."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return set(ast.literal_eval(node.value))
    return set()
