"""docs/evidence.md says which policy is better on which model, from results folders of `kvprune compare`.

    python tests/evidence_page.py                    # page and figures again, from docs/evidence.json
    python tests/evidence_page.py --results FOLDER   # everything anew, from the results folders in FOLDER
    python tests/evidence_page.py --results FOLDER --only demo --only read   # these sets; others as they are

tests/evidence/sets.toml lists the sets: their titles, and the commands that make their results folders. Run
these commands in FOLDER first. A folder that is missing or unfinished, or that another command made, is
refused. Written are docs/evidence.md, docs/evidence.json (all numbers) and docs/evidence_*.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from evidence.figure import figures
from evidence.gather import check_together, gather
from evidence.numbers import EvidenceSet, from_json, to_json
from evidence.page import render
from evidence.plan import PLAN, PlannedSet, read_plan

from kvprune.errors import KVPruneError

DOCS = Path(__file__).parents[1] / "docs"
PAGE, NUMBERS = "evidence.md", "evidence.json"


REWORDED = ("title", "about", "note", "figure", "prepare", "asks", "aims", "same_questions_as")
"""What may change in the plan without reading a results folder again."""


def stored(docs: Path = DOCS) -> dict[str, EvidenceSet]:
    """Return the numbers that were stored; nothing where there are none yet.

    Raises:
        KVPruneError: If they are of another format.
    """
    path = docs / NUMBERS
    return from_json(path.read_text("utf-8")) if path.exists() else {}


def collect(
    plan: Mapping[str, PlannedSet], before: Mapping[str, EvidenceSet], read: Collection[str], root: Path
) -> dict[str, EvidenceSet]:
    """Return all sets of the plan, in its order: read anew, or with the numbers that were stored.

    Args:
        plan: What the page shows.
        before: What was stored.
        read: Keys of the sets to read anew.
        root: The folder of their results folders.

    Raises:
        KVPruneError: If a set is not in the plan, or is neither read nor stored; and see `gather`.
    """
    for key in read:
        if key not in plan:
            raise KVPruneError(f"there is no set {key!r}; the plan has: {', '.join(plan)}")
    found = {}
    for key, planned in plan.items():
        if key in read:
            found[key] = gather(planned, root)
        elif key not in before:
            raise KVPruneError(f"set {key!r} was never read; give --results, and --only {key} for it alone")
        elif before[key].commands != planned.commands:
            raise KVPruneError(f"the commands of set {key!r} have changed; read it again with --results")
        else:
            words = {name: getattr(planned, name) for name in REWORDED}
            found[key] = dataclasses.replace(before[key], **words)
    check_together(found)
    return found


def write(docs: Path, sets: Mapping[str, EvidenceSet]) -> list[Path]:
    """Write page, numbers and figures; return their paths."""
    content = {PAGE: render(sets).encode(), NUMBERS: to_json(sets).encode(), **figures(sets)}
    for name, data in content.items():
        (docs / name).write_bytes(data)
    return [docs / name for name in content]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, help="the folder that holds the results folders")
    parser.add_argument("--only", action="append", default=[], help="key of a set to read; repeatable")
    parser.add_argument("--sets", type=Path, default=PLAN, help="the list of sets (default: %(default)s)")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where to write (default: %(default)s)")
    given = parser.parse_args(arguments)
    try:
        plan = read_plan(given.sets)
        read = given.only or list(plan) if given.results else []
        if given.only and not given.results:
            raise KVPruneError("--only needs --results FOLDER")
        sets = collect(plan, stored(given.docs), read, given.results or Path())
        paths = write(given.docs, sets)
    except KVPruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in paths:
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
