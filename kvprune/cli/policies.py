"""The commands that describe the installed policies: list and show."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvprune.cli.common import Debug, load_quietly, make_console, make_table, one_line_errors, say
from kvprune.cli.facts import known_facts, known_rules
from kvprune.errors import PluginError
from kvprune.text import REFERENCE, docstring, error_line, printable

if TYPE_CHECKING:
    from kvprune.session.registry import PolicyEntry, Registry, RuleEntry

__all__ = ["is_spec", "list_policies", "names_in", "read_docstrings", "show"]

_LONGEST_CLAIM = 400
_LONGEST = 20_000
"""What an author wrote about a policy is printed whole, unless it is far longer than anybody would read."""


def list_policies(debug: Debug = False) -> None:
    """List the installed policies, and the plugins that failed to load."""
    with one_line_errors(debug):
        policies, broken = known_facts()
        table = make_table("policy", "version", "plugin (distribution)", "what it does")
        for facts in policies.values():
            claim = printable(" ".join(facts.text.partition("\n\n")[0].split()), _LONGEST_CLAIM)
            claim = f"({REFERENCE}) {claim}" if facts.is_reference else claim
            table.add_row(facts.name, str(facts.version), facts.origin, claim)
        make_console().print(table)
        rules = make_table("rule of kvprune.contrast", "plugin (distribution)", "what it does")
        for rule in known_rules():
            claim = printable(" ".join(rule.text.partition("\n\n")[0].split()), _LONGEST_CLAIM)
            rules.add_row(rule.name, rule.origin, claim)
        make_console().print(rules)
        for problem in broken:
            say(problem)


def show(
    name: Annotated[
        str,
        typer.Argument(
            help="Name of a policy or a rule, as `kvprune list` prints it; or a spec of policies."
        ),
    ],
    debug: Debug = False,
) -> None:
    """Explain a policy.

    Prints what the policy does, its options, where it comes from and what it costs.
    """
    with one_line_errors(debug):
        from kvprune.session.rules import get_rule

        installed = load_quietly()
        rule = name.partition(":")[0]
        if rule in installed.rules and rule not in installed.policies:
            get_rule(name)  # raises if its options are wrong
            _describe_rule(installed.rules[rule])
            return
        names = names_in(name, installed)
        if len(names) > 1:
            print(f"{printable(str(installed.get_policy(name).spec))} is made of {', '.join(names)}\n")
        for number, one in enumerate(names):
            entry = installed.entry(one)
            print("\n" * bool(number), end="")
            try:
                _describe(entry)
            except (KeyboardInterrupt, BrokenPipeError):  # such as of `kvprune show NAME | head`
                raise
            except BaseException as error:  # the class is foreign code and may raise anything
                raise PluginError(
                    f"policy {one!r} of plugin {entry.plugin!r} cannot be described: {error_line(error)}"
                ) from error


def is_spec(text: str) -> bool:
    """Whether a text says more than a name: no name has one of these characters."""
    return any(mark in text for mark in (":", " ", "("))


def names_in(text: str, installed: Registry) -> list[str]:
    """Return the names of all policies in a spec, each once; a text without options is a name.

    Raises:
        KVPruneError: If it is a spec of no usable policy.
    """
    from kvprune.policy.nesting import parts

    if not is_spec(text):
        return [text]
    return list(dict.fromkeys(part.name for part in parts(installed.get_policy(text))))


def _describe(entry: PolicyEntry) -> None:
    """Print what a policy's docstring, class attributes and options say."""
    from kvprune.policy.spec import PolicySpec

    policy = entry.cls
    text, meanings = read_docstrings(policy)
    print(f"{entry.name}, version {entry.version}, from plugin {entry.plugin} ({entry.distribution})\n")
    print(printable(text, _LONGEST, newlines=True) + "\n")
    facts = {"kind": REFERENCE} if policy.reads_answer else {}
    facts |= {"paper": policy.paper, "fidelity": policy.fidelity, "differs": policy.differs}
    facts |= {"checked": policy.checked_against, "cost": policy.cost}
    for fact, said in facts.items():
        print(f"{fact + ':':<10}{printable(said, _LONGEST) or '-'}")
    for preset, options in policy.presets.items():
        print(
            f"{'preset:':<10}{printable(str(PolicySpec(entry.name, {'preset': preset})), _LONGEST)} = ",
            end="",
        )
        print(printable(str(PolicySpec(entry.name, options)), _LONGEST))
    if policy.bibtex:
        print(f"{'cite:':<10}kvprune cite {entry.name}")
    _print_options(policy, policy.option_types(), meanings)


def _describe_rule(entry: RuleEntry) -> None:
    """Print what the docstring, class attributes and options of a rule of `kvprune.contrast` say."""
    from kvprune.session.contrast_rules import option_types

    text, meanings = read_docstrings(entry.cls)
    print(f"{entry.name}, a rule of kvprune.contrast, from plugin {entry.plugin} ({entry.distribution})\n")
    print(printable(text, _LONGEST, newlines=True) + "\n")
    facts = {"paper": entry.cls.paper, "fidelity": entry.cls.fidelity, "pruned as": entry.cls.pruned_as}
    for fact, said in facts.items():
        print(f"{fact + ':':<10}{printable(said, _LONGEST) or '-'}")
    if entry.cls.bibtex:
        print(f"{'cite:':<10}kvprune cite {entry.name}")
    _print_options(entry.cls, option_types(entry.cls), meanings)


def _print_options(cls: Any, types: Mapping[str, Any], meanings: Mapping[str, str]) -> None:
    """Print a table of the options of a policy or a rule."""
    from kvprune.policy.options import describe_type

    table = make_table("option", "type", "default", "meaning")
    for option in dataclasses.fields(cls):
        row = option.name, describe_type(types[option.name]), _default(option), meanings.get(option.name, "-")
        table.add_row(*(printable(cell, _LONGEST) for cell in row))
    print()
    if types:
        make_console().print(table)
    else:
        print("It has no options.")


def _default(option: dataclasses.Field[Any]) -> str:
    """Return an option's default as a spec writes it, or "required"."""
    from kvprune.policy.base import CrossKVPolicy
    from kvprune.policy.options import default_of
    from kvprune.policy.spec import written

    default = default_of(option)
    if default is dataclasses.MISSING:
        return "required"
    return written(default.nested_spec if isinstance(default, CrossKVPolicy) else default) or "empty"


def read_docstrings(policy: type) -> tuple[str, dict[str, str]]:
    """Return a class's docstring without its arguments, and the meaning of each argument by name.

    Meanings come from the docstrings of the class and its bases. Deviations from the paper follow the
    docstring.
    """
    meanings: dict[str, str] = {}
    for cls in reversed(policy.__mro__):
        arguments = _ARGUMENTS.search(docstring(cls))
        for name, meaning in _ARGUMENT.findall(arguments[1] if arguments else ""):
            meanings[name] = " ".join(meaning.split())
    text = _ARGUMENTS.sub("", docstring(policy))
    if deviations := inspect.cleandoc(getattr(policy, "deviations", "")):
        text += f"\n\nDeviations:\n{deviations}"
    return re.sub("\n{3,}", "\n\n", text).strip(), meanings


_ARGUMENTS = re.compile(r"^(?:Args|Attributes):\n((?:[ ]+\S.*\n?|\n(?=[ ]))*)", re.MULTILINE)
_ARGUMENT = re.compile(r"^ {4}(\w+)(?: \([^)]*\))?:((?:.*)(?:\n {5,}.*)*)", re.MULTILINE)
