"""Commands that look at what is installed: list, show, doctor."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from contextlib import redirect_stdout
from typing import Annotated, Any

import typer

from kvprune.cli.common import (
    Debug,
    load_quietly,
    make_console,
    make_table,
    one_line_errors,
    quieten_transformers,
    say,
)
from kvprune.errors import PluginError
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.options import default_of, describe_type
from kvprune.policy.spec import written
from kvprune.session import registry
from kvprune.text import error_line, printable

__all__ = ["doctor", "list_policies", "read_docstrings", "show"]


def list_policies(debug: Debug = False) -> None:
    """List installed policies, and plugins that could not be loaded."""
    with one_line_errors(debug):
        found = load_quietly()
        table = make_table("policy", "version", "plugin (distribution)", "what it does")
        for entry in found.policies.values():
            claim = " ".join(_docstring(entry.cls).partition("\n\n")[0].split())
            plugin = f"{entry.plugin} ({entry.distribution})"
            table.add_row(entry.name, str(entry.version), plugin, printable(claim, 400))
        make_console().print(table)
        for broken in found.broken:
            say(f"broken plugin {broken.name} ({broken.distribution}): {broken.problem}")


def show(
    name: Annotated[str, typer.Argument(help="A policy's name, as `kvprune list` prints it.")],
    debug: Debug = False,
) -> None:
    """Explain one policy: what it does, its options, where it comes from and what it costs."""
    with one_line_errors(debug):
        found = load_quietly()
        found.policy_class(name)
        entry = found.policies[name]
        try:
            _describe(entry)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the class is foreign code, too
            raise PluginError(
                f"policy {name!r} of plugin {entry.plugin!r} cannot be described: {error_line(error)}"
            ) from error


def _describe(entry: registry.PolicyEntry) -> None:
    policy = entry.cls
    text, meanings = read_docstrings(policy)
    print(f"{entry.name}, version {entry.version}, from plugin {entry.plugin} ({entry.distribution})\n")
    print(printable(text, 20_000, newlines=True) + "\n")
    for fact in ("paper", "fidelity", "cost"):
        print(f"{fact + ':':<10}{printable(getattr(policy, fact), 400) or '-'}")
    if policy.bibtex:
        print(f"{'cite:':<10}kvprune cite {entry.name}")
    types = policy.option_types()
    table = make_table("option", "type", "default", "meaning")
    for option in dataclasses.fields(policy):
        row = option.name, describe_type(types[option.name]), _default(option), meanings.get(option.name, "-")
        table.add_row(*(printable(cell, 400) for cell in row))
    print()
    if types:
        make_console().print(table)
    else:
        print("It has no options.")


def _default(option: dataclasses.Field[Any]) -> str:
    default = default_of(option)
    if default is dataclasses.MISSING:
        return "required"
    return written(default.nested_spec if isinstance(default, CrossKVPolicy) else default)


def doctor(debug: Debug = False) -> None:
    """Check versions, plugins, what adapters rely on in transformers, and the demo model."""
    from kvprune.cli.doctor import examine

    with one_line_errors(debug), redirect_stdout(sys.stderr):
        quieten_transformers()
        checks = examine()
    section = ""
    for check in checks:
        if check.section != section:
            section = check.section
            print(section)
        mark = {True: "ok", False: "FAIL", None: "-"}[check.ok]
        print(f"  {mark:<5} {check.name}: {check.detail}")
        if check.ok is False:
            print(f"        to do: {check.remedy}")
    failed = sum(check.ok is False for check in checks)
    print(f"{failed} of {len(checks)} checks failed." if failed else "All is well.")
    raise typer.Exit(1 if failed else 0)


def _docstring(cls: type) -> str:
    """Return the docstring that an author wrote; not the signature that a dataclass makes up."""
    text = getattr(cls, "__doc__", None)
    if not isinstance(text, str) or text.startswith(f"{cls.__name__}("):
        return ""
    return inspect.cleandoc(text)


def read_docstrings(policy: type) -> tuple[str, dict[str, str]]:
    """Return a class's docstring without its arguments, and each argument's meaning, inherited or not.

    Deviations from the paper follow the docstring.
    """
    meanings: dict[str, str] = {}
    for cls in reversed(policy.__mro__):
        arguments = _ARGUMENTS.search(_docstring(cls))
        for name, meaning in _ARGUMENT.findall(arguments[1] if arguments else ""):
            meanings[name] = " ".join(meaning.split())
    text = _ARGUMENTS.sub("", _docstring(policy))
    if deviations := inspect.cleandoc(getattr(policy, "deviations", "")):
        text += f"\n\nDeviations:\n{deviations}"
    return re.sub("\n{3,}", "\n\n", text).strip(), meanings


_ARGUMENTS = re.compile(r"^(?:Args|Attributes):\n((?:[ ]+\S.*\n?|\n(?=[ ]))*)", re.MULTILINE)
_ARGUMENT = re.compile(r"^ {4}(\w+)(?: \([^)]*\))?:((?:.*)(?:\n {5,}.*)*)", re.MULTILINE)
