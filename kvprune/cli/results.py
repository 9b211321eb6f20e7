"""Commands for results folders: results list, results export, results diff, results tau."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvprune.cli.common import Debug, make_console, one_line_errors, read_ratios, say
from kvprune.errors import KVPruneError, ResultsError
from kvprune.text import printable, printable_json

if TYPE_CHECKING:
    from rich.table import Table

    from kvprune.comparison.statistics.rank_agreement import RankAgreement
    from kvprune.comparison.statistics.run_differences import RunDifferences
    from kvprune.comparison.statistics.summary import Summary

__all__ = ["results"]

results = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="List, export and compare results folders.",
)

_MANIFEST = "manifest.json"
_OWN_FILES = (_MANIFEST, "results.jsonl", "timings.jsonl", "summary.json")
_MOST_CHANGES = 20

Json = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]


@results.command("list")
def list_results(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Results folders. Default: those in the current folder, and it itself."),
    ] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """List results folders: what each compares, on what, and how much of it is done."""
    with one_line_errors(debug):
        from kvprune.comparison.storage.folder_description import describe_folder

        found: list[dict[str, Any]] = []
        for folder in folders or _here():
            try:
                found.append(asdict(describe_folder(folder)))
            except KVPruneError as error:
                if folders:
                    raise
                found.append({"folder": folder, "unreadable": str(error)})
        if not found:
            raise ResultsError("there are no results folders here; `kvprune results list FOLDER` looks there")
    if json_output:
        print(printable_json([{**one, "folder": str(one["folder"])} for one in found]))
    else:
        console = make_console()
        console.print(_listing(found))
        for one in found:
            if "unreadable" in one:
                say(f"{one['folder']} cannot be read: {one['unreadable']}")


@results.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Results folder.")],
    form: Annotated[
        str,
        typer.Option(
            "--format", help="csv or parquet (all fields), markdown or latex (the table for a paper)."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="File to write. Default: standard output; parquet needs a file.")
    ] = None,
    answers: Annotated[bool, typer.Option("--answers", help="Every answer instead of the table.")] = False,
    against: Annotated[
        str | None,
        typer.Option(help="Policy that others are compared with. Default: that of the folder."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Export the table of a results folder, or every answer, for other programs and for papers."""
    with one_line_errors(debug):
        from kvprune.comparison.display import exports
        from kvprune.comparison.storage.journal import write_atomically
        from kvprune.comparison.storage.stored_run import read_run

        if output is not None:
            _check_output(output)
        elif form == "parquet":
            raise KVPruneError("parquet is no text for a terminal; name a file with --output")
        stored = read_run(folder)
        content = exports.export(stored, form, answers=answers, against=against)
        if output is None:
            sys.stdout.write(content.decode())
            return
        write_atomically(output, content)
        say(f"wrote {output}")


@results.command()
def diff(
    first: Annotated[Path, typer.Argument(help="A results folder.")],
    second: Annotated[Path, typer.Argument(help="Another results folder.")],
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Compare two results folders: the same configurations on the examples that both answered.

    The differences are those of the second folder minus the first, paired by example.
    """
    with one_line_errors(debug):
        from kvprune.comparison.statistics.run_differences import compare_runs
        from kvprune.comparison.storage.stored_run import read_run

        found = compare_runs(read_run(first), read_run(second))
    if json_output:
        print(printable_json(asdict(found)))
        return
    console = make_console()
    if found.rows:
        console.print(_difference_table(found))
        console.print()
    for line in _difference_notes(found):
        console.print(printable(line))


@results.command()
def tau(
    first: Annotated[Path, typer.Argument(help="A results folder.")],
    second: Annotated[Path, typer.Argument(help="Another results folder.")],
    keep_ratios: Annotated[
        str | None,
        typer.Option(help="Budgets to look at, such as 0.25,0.1. Default: all that both folders have."),
    ] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Say how far two results folders agree on which policy is better: Kendall's tau-b of their rankings.

    The folders may differ in model, data and metric: pictures are ranked by right answers, speech by word
    error rate. Policies are the same if their specs are.
    """
    with one_line_errors(debug):
        from kvprune.comparison.statistics.rank_agreement import rank_agreements, ranked_scores
        from kvprune.comparison.statistics.stored_summary import summary_of
        from kvprune.comparison.storage.stored_run import read_run

        ratios = None if keep_ratios is None else read_ratios(keep_ratios)
        summaries = [summary_of(read_run(folder)) for folder in (first, second)]
        scores = [ranked_scores(summary) for summary in summaries]
        found = rank_agreements(scores[0], scores[1], ratios)
    if json_output:
        print(printable_json([asdict(one) for one in found]))
        return
    console = make_console()
    console.print(_agreement_table(found))
    console.print()
    for line in _agreement_notes(found, summaries):
        console.print(printable(line))


def _here() -> list[Path]:
    """Return the results folders at the current place: it itself, and those in it."""
    here = Path()
    places = [here, *sorted(one for one in here.iterdir() if one.is_dir() and not one.is_symlink())]
    return [one for one in places if (one / _MANIFEST).is_file() and (one / "results.jsonl").exists()]


def _check_output(output: Path) -> None:
    """Refuse a file that belongs to a results folder, or a place that cannot be written."""
    if output.name in _OWN_FILES and (output.parent / _MANIFEST).exists():
        raise KVPruneError(f"{output} belongs to a results folder; name another file")
    if not output.parent.is_dir():
        raise KVPruneError(f"there is no folder {output.parent} to write {output.name} to")
    if output.exists() and not output.is_file():
        raise KVPruneError(f"{output} is not a file; name another one")


def _listing(found: list[dict[str, Any]]) -> Table:
    from kvprune.cli.common import make_table

    table = make_table("folder", "created", "kind", "model", "data", "examples", "rows", "answers", "table")
    for one in found:
        if "unreadable" in one:
            table.add_row(printable(str(one["folder"])), "cannot be read", *[""] * 7)
            continue
        whole = one["answers"] + one["missing"]
        old = f" (+{one['old']} old)" if one["old"] else ""
        cells = (
            str(one["folder"]),
            one["created"][:16].replace("T", " "),
            one["kind"],
            Path(one["model"]).name or one["model"],
            Path(one["data"]).name or one["data"],
            str(one["examples"]),
            str(len(one["specs"])),
            f"{one['answers']} of {whole}{old}",
            "yes" if one["summarised"] else "not yet",
        )
        table.add_row(*(printable(cell) for cell in cells))
    return table


def _difference_table(found: RunDifferences) -> Table:
    from kvprune.cli.common import make_table

    metric = "WER %" if found.kind == "speech" else "right %"
    table = make_table(
        "configuration",
        f"first {metric}",
        f"second {metric}",
        "difference [95 %]",
        "p",
        "n",
        "answers",
        "receipts",
    )
    for column in table.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    for row in found.rows:
        gap = row.difference
        cells = (
            row.spec,
            f"{100 * row.first.value:.1f}",
            f"{100 * row.second.value:.1f}",
            f"{100 * gap.value:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]",
            f"{gap.p_value:.3f}",
            str(row.examples),
            _share(row.same_answers, row.answers),
            _share(row.same_receipts, row.answers),
        )
        table.add_row(*(printable(cell) for cell in cells))
    return table


def _share(same: int, whole: int) -> str:
    return "all same" if same == whole else f"{same}/{whole} same"


def _difference_notes(found: RunDifferences) -> list[str]:
    """Return what the table does not say: what only one folder has, and what changed in the ingredients."""
    said = []
    if found.rows:
        said.append(
            "Paired by example, on the n examples that both folders answered; p is not corrected for the "
            "number of rows. Equal receipts mean that the same tokens were kept."
        )
    for name, specs in (("first", found.only_first), ("second", found.only_second)):
        if specs:
            said.append(f"Only in the {name} folder: {', '.join(specs)}.")
    if found.unpaired:
        said.append(f"In both, without a common example: {', '.join(found.unpaired)}.")
    if not found.changed:
        said.append("All recorded ingredients are equal.")
        return said
    said.append("What changed from the first to the second folder:")
    said += [f"  {change}" for change in found.changed[:_MOST_CHANGES]]
    if len(found.changed) > _MOST_CHANGES:
        said.append(f"  and {len(found.changed) - _MOST_CHANGES} more (--json has all)")
    return said


def _agreement_table(found: Sequence[RankAgreement]) -> Table:
    from kvprune.cli.common import make_table
    from kvprune.comparison.display.naming import p_text

    table = make_table("budget", "tau-b", "p", "policies")
    for column in table.columns[1:]:
        column.justify = "right"
    for one in found:
        table.add_row(
            "mean rank" if one.keep_ratio is None else f"{100 * one.keep_ratio:.4g} %",
            "-" if one.tau is None else f"{one.tau:+.2f}",
            "-" if one.p_value is None else p_text(one.p_value),
            str(len(one.policies)),
        )
    return table


def _agreement_notes(found: Sequence[RankAgreement], summaries: Sequence[Summary]) -> list[str]:
    """Return what the table does not say: what tau means, and which policies are not in it."""
    said = [
        "tau-b is 1 where both folders rank the policies in the same order, 0 where the orders are "
        "unrelated, -1 where one is the reverse of the other."
    ]
    budgets = [one for one in found if one.keep_ratio is not None]
    if len(found) > len(budgets):
        said.append("mean rank: policies are ranked by the mean of their ranks over the budgets above.")
    if any(one.tau is None for one in found):
        said.append("- : fewer than two policies are in both folders, or all are equal in one of them.")
    chosen = [one.keep_ratio for one in budgets]
    rows = [row for summary in summaries for row in summary.rows if row.keep_ratio in chosen]
    labels = [{row.label for row in summary.rows if row.keep_ratio in chosen} for summary in summaries]
    references = {row.label for row in rows if row.is_reference}
    for what, names in (
        ("Not ranked, because it looks at the answer", references),
        (
            "Not ranked at each budget at which it kept another share",
            {r.label for r in rows if r.misses_budget},
        ),
        ("Only in one of the folders", (labels[0] ^ labels[1]) - references),
    ):
        if names:
            said.append(f"{what}: {', '.join(sorted(names))}.")
    return said
