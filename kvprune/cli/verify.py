"""The command that runs a part of a comparison again: verify."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from kvprune.cli.common import Debug, TrustRemoteCode, hide_progress_bars, one_line_errors
from kvprune.text import printable_json

__all__ = ["verify"]


def verify(
    results: Annotated[Path, typer.Argument(help="Results folder that `kvprune compare` wrote.")],
    sample: Annotated[
        int, typer.Option(help="Number of compressed batches to run again; each also runs uncompressed.")
    ] = 8,
    seed: Annotated[int, typer.Option(help="Seed for drawing these batches.")] = 0,
    everything: Annotated[bool, typer.Option("--all", help="Run everything again.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the verification as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Run a part of a comparison again and say whether it reproduces.

    The results folder is not changed. The exit code is 1 if an answer or a receipt does not reproduce.
    """
    with one_line_errors(debug):
        from kvprune.comparison import verify as run
        from kvprune.comparison.display.console import progress_bar

        hide_progress_bars()
        with redirect_stdout(sys.stderr), progress_bar() as on_progress:
            found = run(
                results,
                sample=None if everything else sample,
                seed=seed,
                trust_remote_code=trust_remote_code,
                on_progress=on_progress,
            )
    print(printable_json(found.to_dict()) if json_output else found)
    raise typer.Exit(0 if found.reproduces else 1)
