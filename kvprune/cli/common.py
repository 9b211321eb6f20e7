"""What the commands share: common options, tables, and errors printed as one line."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Annotated

import typer

from kvprune.errors import KVPruneError, PolicyOptionError
from kvprune.text import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from kvprune.session.registry import Registry

__all__ = [
    "Debug",
    "TrustRemoteCode",
    "hide_progress_bars",
    "hide_warnings",
    "load_quietly",
    "make_console",
    "make_table",
    "one_line_errors",
    "read_ratios",
    "say",
]

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python files that come with the model. Read them first: they can do whatever you can.",
    ),
]

_WIDTH = 120
"""Width of a table, in characters, if standard output is no terminal."""


@contextmanager
def one_line_errors(debug: bool, *, resumes: bool = False) -> Iterator[None]:
    """Print errors that the user can fix as one line and exit with code 2; exit with 130 on an interrupt.

    Args:
        debug: Raise the error instead.
        resumes: Whether the same command continues where it was interrupted.
    """
    try:
        yield
    except KeyboardInterrupt:
        say("interrupted" + "; the same command continues where this one stopped" * resumes)
        raise typer.Exit(130) from None
    except (KVPruneError, ModuleNotFoundError) as error:
        if debug:
            raise
        say(f"error: {error}")
        raise typer.Exit(2) from None


def hide_progress_bars() -> None:
    """Turn off the progress bars of transformers, which would break up what a command prints."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@contextmanager
def hide_warnings() -> Iterator[None]:
    """Keep the warnings of transformers off the terminal inside a ``with`` block."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def load_quietly() -> Registry:
    """Load all plugins; what they print goes to standard error, to keep a command's output clean."""
    from kvprune.session import registry

    with redirect_stdout(sys.stderr):
        return registry.load()


def make_table(*columns: str) -> Table:
    """Return an empty table; its first column is never wrapped."""
    from rich import box
    from rich.table import Table

    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.columns[0].no_wrap = True
    return table


def make_console() -> Console:
    """Return a console for standard output; its width is fixed if that is no terminal."""
    from rich.console import Console

    # Text of plugins is shown as it is: no markup, no :emoji:.
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=False)
    if console.is_terminal:
        return console
    return Console(width=_WIDTH, highlight=False, markup=False, emoji=False)


def say(text: str) -> None:
    """Print a message on standard error, apart from a command's result; what does not print is escaped."""
    print(f"kvprune: {printable(text, newlines=True)}", file=sys.stderr)


def read_ratios(text: str) -> list[float]:
    """Return the fractions of a text such as ``0.5,0.25``; whether each is a budget is checked later.

    Raises:
        PolicyOptionError: If a part is no number.
    """
    return [_ratio(part) for part in re.split("[,;]", text)]


def _ratio(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise PolicyOptionError(
            f"keep ratio {text.strip()!r} is no number; expected fractions such as 0.5,0.25"
        ) from None
