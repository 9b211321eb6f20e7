"""The command that prints what to cite: cite."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated

import typer

from kvprune.cli.common import Debug, load_quietly, one_line_errors
from kvprune.errors import CitationError
from kvprune.policy.base import CrossKVPolicy
from kvprune.text import printable

__all__ = ["FRAMEWORK", "cite", "own_bibtex"]

FRAMEWORK = "kvprune"
"""The name under which the framework itself is cited."""

_OWN = """\
@software{{kvprune,
  title = {{{{kvprune}}: pruning the cross-attention {{KV}} cache of vision-language models}},
  author = {{{{The kvprune authors}}}},
  year = {{2026}},
  version = {{{version}}},
}}"""
"""What CITATION.cff says, for BibTeX; a test compares the two."""


def cite(
    names: Annotated[
        list[str], typer.Argument(help="Names of policies, or kvprune for the framework itself; repeatable.")
    ],
    debug: Debug = False,
) -> None:
    """Print BibTeX entries: of the papers that policies come from, and of kvprune."""
    with one_line_errors(debug):
        found = load_quietly()
        entries = [
            own_bibtex() if name == FRAMEWORK else _bibtex(found.policy_class(name))
            for name in dict.fromkeys(names)
        ]
        print(printable("\n\n".join(dict.fromkeys(entries)), newlines=True))


def own_bibtex() -> str:
    """Return the BibTeX entry of kvprune, in the version that is installed."""
    return _OWN.format(version=metadata.version("kvprune"))


def _bibtex(policy: type[CrossKVPolicy]) -> str:
    """Return a policy's BibTeX entry.

    Raises:
        CitationError: If it has none; says what to cite instead.
    """
    if policy.bibtex.strip():
        return policy.bibtex.strip()
    own = f"cite kvprune itself (kvprune cite {FRAMEWORK})"
    if policy.paper:
        paper = printable(policy.paper, 400)
        raise CitationError(
            f"policy {policy.name!r} brings no BibTeX entry; cite its paper by hand: {paper}; and {own}"
        )
    raise CitationError(f"policy {policy.name!r} has no paper of its own; name it and {own}")
