"""The command that prints what to cite: cite."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Annotated

import typer

from kvprune.cli.common import Debug, load_quietly, one_line_errors
from kvprune.cli.facts import Facts, known_facts, known_rules
from kvprune.cli.policies import is_spec, names_in
from kvprune.errors import CitationError
from kvprune.text import REFERENCE, printable

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
"""CITATION.cff as BibTeX; a test compares the two."""


def cite(
    names: Annotated[
        list[str],
        typer.Argument(help="Names of policies or rules, specs, or kvprune for the framework itself."),
    ],
    debug: Debug = False,
) -> None:
    """Print BibTeX entries of policies' papers, or of kvprune itself."""
    with one_line_errors(debug):
        wanted = dict.fromkeys(names)
        known = known_facts()[0] if {*wanted} - {FRAMEWORK} else {}
        entries = [
            own_bibtex() if one == FRAMEWORK else _bibtex(one, known)
            for name in wanted
            for one in _citable(name, known)
        ]
        print(printable("\n\n".join(dict.fromkeys(entries)), newlines=True))


def _citable(name: str, known: Mapping[str, Facts]) -> list[str]:
    """Return the name, or for a spec the names of its policies that have a paper, or of all if none has."""
    if not is_spec(name):
        return [name]
    rule = name.partition(":")[0]
    if rule not in known and rule in {one.name for one in known_rules()}:
        return [rule]
    names = names_in(name, load_quietly())
    return [one for one in names if one not in known or known[one].bibtex.strip()] or names


def own_bibtex() -> str:
    """Return the BibTeX entry of kvprune, with the installed version."""
    return _OWN.format(version=metadata.version("kvprune"))


def _bibtex(name: str, known: Mapping[str, Facts]) -> str:
    """Return a policy's BibTeX entry.

    Raises:
        CitationError: If the policy has no entry; says what to cite instead.
        KVPruneError: If there is no such policy; see `Registry.entry`.
    """
    rules = {} if name in known else {rule.name: rule for rule in known_rules()}
    policy, what = known.get(name) or rules.get(name), "rule" if name in rules else "policy"
    if policy is None:
        load_quietly().entry(name)  # raises, and says which names there are
        raise CitationError(f"policy {name!r} was installed a moment ago; run the command again")
    if policy.bibtex.strip():
        return policy.bibtex.strip()
    kind = f"is a {REFERENCE}, and " if policy.is_reference else ""
    own = f"cite kvprune itself (kvprune cite {FRAMEWORK})"
    if policy.paper:
        paper = printable(policy.paper, 400)
        raise CitationError(
            f"{what} {policy.name!r} brings no BibTeX entry; cite its paper by hand: {paper}; and {own}"
        )
    raise CitationError(f"{what} {policy.name!r} {kind}has no paper of its own; name it and {own}")
