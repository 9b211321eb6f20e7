"""What the commands share: options, tables, and errors as one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from kvprune.errors import KVPruneError
from kvprune.session import registry
from kvprune.text import printable

__all__ = [
    "Debug",
    "load_quietly",
    "make_console",
    "make_table",
    "one_line_errors",
    "quiet_transformers",
    "quieten_transformers",
    "say",
]

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

_WIDTH = 120
"""Columns of a table where standard output is no terminal."""


@contextmanager
def one_line_errors(debug: bool, *, resumes: bool = False) -> Iterator[None]:
    """Turn errors that the user can do something about into one line and exit code 2.

    Args:
        debug: Raise them instead.
        resumes: Whether the same command goes on where it was interrupted.
    """
    try:
        yield
    except KeyboardInterrupt:
        say("interrupted" + "; the same command continues where this one stopped" * resumes)
        raise typer.Exit(130) from None
    except (KVPruneError, ModuleNotFoundError) as error:
        if debug:
            raise
        say(f"error: {printable(str(error), newlines=True)}")
        raise typer.Exit(2) from None


def quieten_transformers() -> None:
    """Keep its bars for loading weights from breaking what this command prints."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep its warnings off the terminal for a while."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def load_quietly() -> registry.Registry:
    """Load all plugins; what they print goes to standard error, which is no part of a command's answer."""
    with redirect_stdout(sys.stderr):
        return registry.load()


def make_table(*columns: str) -> Table:
    """Return an empty table; its first column is never wrapped."""
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.columns[0].no_wrap = True
    return table


def make_console() -> Console:
    """Return a console for standard output, of fixed width where that is no terminal."""
    # Text of plugins is shown as it is: no markup, no :emoji:.
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=False)
    if console.is_terminal:
        return console
    return Console(width=_WIDTH, highlight=False, markup=False, emoji=False)


def say(text: str) -> None:
    """Print a line about the run, not of its result, on standard error."""
    print(f"kvprune: {text}", file=sys.stderr)
