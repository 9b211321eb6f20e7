"""The command line: parses, calls the library and prints; what is computed is computed elsewhere.

`looking` has list, show and doctor; `citing` has cite; `checking` has check; `running` has compare and
verify; `benching` has bench; `common` what all of them share.
"""

from __future__ import annotations

import io
import sys
from importlib import metadata
from typing import Annotated

try:
    import rich  # noqa: F401
    import typer
except ModuleNotFoundError as missing:
    raise SystemExit(
        f'kvprune: the command line needs {missing.name}, which is not installed: pip install "kvprune[demo]"'
    ) from missing

from kvprune.cli import benching, checking, citing, looking, running

__all__ = ["app", "main"]

app = typer.Typer(
    name="kvprune",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Prune the cross-attention KV cache of vision-language models, and compare how well that works.",
)
# In the order in which --help lists them.
app.command("list")(looking.list_policies)
app.command()(looking.show)
app.command()(citing.cite)
app.command()(looking.doctor)
app.command()(checking.check)
app.command()(running.compare)
app.command()(running.verify)
app.add_typer(benching.bench, name="bench")


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A docstring must not end a command on a terminal without UTF-8.
            stream.reconfigure(errors="backslashreplace")
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"kvprune {metadata.version('kvprune')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
