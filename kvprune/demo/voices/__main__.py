"""Make recordings of synthetic voices to compare policies on: `python -m kvprune.demo.voices --output F`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvprune.demo.voices.speech_set import write_speech_set
from kvprune.errors import KVPruneError
from kvprune.text import printable


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, as `kvprune` does."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write to; a set in it grows")
    parser.add_argument("--count", type=int, default=216, help="number of recordings (default: 216)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other sentences (default: 0)")
    options = parser.parse_args(arguments)
    columns = (TextColumn("speaking"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=options.count)
            table = write_speech_set(
                options.output,
                options.count,
                options.seed,
                on_progress=lambda done, total: bar.update(task, completed=done),
            )
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except (KVPruneError, ModuleNotFoundError, OSError, ValueError) as error:
        print(f"error: {printable(str(error), newlines=True)}", file=sys.stderr)
        return 2
    print(f"{options.count} recordings: kvprune compare --data {printable(str(table))} --model MODEL")
    return 0


if __name__ == "__main__":
    sys.exit(main())
