"""Which of kvprune's own files a results folder depends on, and their digest.

Answers count only while the code that produced them is the same: its digest is part of their addresses.
`CODE` says for each part of the package whether it counts, and why; docs/results-folder.md shows it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CODE", "Part", "code_digest", "covered_files", "find_part"]

PACKAGE = Path(__file__).parents[2]
"""The folder of the package `kvprune`."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the package.

    Attributes:
        path: a folder, written with a slash at its end, or a file; relative to the package.
        covered: whether answers of a results folder are old after an edit of it.
        reason: why.
    """

    path: str
    covered: bool
    reason: str


CODE = (
    Part("tokens/", True, "which tokens there are, who sees them, and which are kept"),
    Part("scoring/", True, "scores that policies rank tokens by"),
    Part("cache/", True, "keys and values that decoding reads, and the bytes they take"),
    Part("policy/", True, "base classes of policies, their views and options"),
    Part("engine/", True, "asks the policy, applies its decision, measures what was kept"),
    Part("adapters/", True, "hooks into the model families"),
    Part("session/", True, "finds policies and adapters, and attaches them to a model"),
    Part("demo/", True, "the default questions and pictures, and how the demo model is loaded"),
    Part("comparison/plan/", True, "which configurations run, and with which settings"),
    Part("comparison/data/", True, "reads questions and pictures, and judges answers"),
    Part("comparison/execution/", True, "builds prompts, generates answers, computes receipts, takes times"),
    Part("comparison/storage/", True, "writes the lines of a results folder and reads them back"),
    Part("comparison/statistics/", False, "each run computes its summary anew from all lines"),
    Part("comparison/display/", False, "only shows a summary: table, notes, figure, progress"),
    Part("comparison/verification/", False, "only reads a results folder"),
    Part("comparison/studies/", False, "starts comparisons; their manifests record the settings"),
    Part("comparison/__init__.py", False, "public names only"),
    Part("training/", False, "trains weights; the digest of their file is part of the spec"),
    Part("testing/", False, "tests policies and adapters; a comparison does not use it"),
    Part("cli/", False, "only reads options and prints; the manifest records the settings"),
    Part("errors.py", False, "classes of errors"),
    Part("text.py", False, "wording of messages"),
    Part("__init__.py", False, "public names only"),
    Part("__main__.py", False, "only starts the command line"),
)
"""Every Python file of the package belongs to exactly one part."""


def find_part(file: str) -> Part | None:
    """Return the part that a file belongs to, or None where `CODE` has no entry for it.

    Args:
        file: Path relative to the package, with forward slashes.
    """
    for part in CODE:
        if file == part.path or (part.path.endswith("/") and file.startswith(part.path)):
            return part
    return None


def covered_files(package: Path = PACKAGE) -> Iterator[Path]:
    """Yield the Python files that a results folder depends on, in a fixed order.

    A file without an entry in `CODE` counts: computing anew is safer than mixing answers of two programs.

    Args:
        package: The folder of the package.
    """
    for path in sorted(package.rglob("*.py"), key=lambda path: path.relative_to(package).as_posix()):
        part = find_part(path.relative_to(package).as_posix())
        if part is None or part.covered:
            yield path


def code_digest(package: Path | None = None) -> str:
    """Return the SHA-256 (64 hexadecimal digits) of the names and contents of all covered files.

    Args:
        package: The folder of the package; None is the package that is running.
    """
    root = PACKAGE if package is None else package
    total = hashlib.sha256()
    for path in covered_files(root):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(root).as_posix()}:{content}\n".encode())
    return total.hexdigest()
