"""The command line: parses arguments, calls the library and prints the result.

One file for each command (`policies` has list and show); `common` holds what they share. torch and
transformers are imported inside the commands, so that ``kvprune --help`` answers at once.
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
        f"kvprune: the command line needs {missing.name}, which is not installed: pip install {missing.name}"
    ) from missing

from kvprune.cli import bench, check, cite, compare, doctor, policies, results, study, train, verify

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
app.command("list")(policies.list_policies)
app.command()(policies.show)
app.command()(cite.cite)
app.command()(doctor.doctor)
app.command()(check.check)
app.command()(compare.compare)
app.command()(study.study)
app.command()(verify.verify)
app.command()(train.train)
app.add_typer(results.results, name="results")
app.add_typer(bench.bench, name="bench")


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Text that the terminal's encoding cannot show must not end a command with an error.
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
