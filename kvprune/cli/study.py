"""The command that compares the same policies on several data sets, and prints one table: study."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvprune.cli.common import (
    Debug,
    TrustRemoteCode,
    hide_progress_bars,
    make_console,
    make_table,
    one_line_errors,
    say,
)
from kvprune.errors import StudyError
from kvprune.text import printable, printable_json

if TYPE_CHECKING:
    from rich.table import Table

    from kvprune.comparison.studies.plan import Plan
    from kvprune.comparison.studies.study_table import StudyTable

__all__ = ["study"]


def study(
    name: Annotated[
        str | None,
        typer.Argument(help="A study that comes with kvprune, or a .toml file. Without it, all are listed."),
    ] = None,
    data_folder: Annotated[
        Path | None, typer.Option(help="Folder that the files of the data sets are relative to.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the table and for the results folder of each data set. The same command "
            "continues where it was interrupted. Default: kvprune-study-NAME."
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Title of a data set to run; repeatable. Default: all.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder, in place of the model of the study.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Device, such as cpu or cuda. Default: cuda if available, else cpu.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Examples per task, in place of the limits of the study.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Examples per call of generate, in place of that of the study.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Check study, policies and data, and list what would run."),
    ] = False,
    show: Annotated[
        bool, typer.Option("--print", help="Print the study file, to start your own from.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print study.json on standard output, and nothing else there.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Compare policies on several data sets, and print one table.

    A study file states model, policies, budgets and data sets. Each data set gets a results folder of its
    own.
    """
    with one_line_errors(debug, resumes=not check):
        from kvprune.comparison.studies.plan import Overrides, plan_study
        from kvprune.comparison.studies.run import run_study
        from kvprune.comparison.studies.study import find_study

        if name is None:
            make_console().print(_listing())
            return
        found = find_study(name)
        if show:
            sys.stdout.write(found.path.read_text("utf-8"))
            return
        hide_progress_bars()
        with redirect_stdout(sys.stderr):  # plugins may print
            planned = plan_study(
                found,
                output=Path(f"kvprune-study-{found.path.stem}") if output is None else output,
                data_folder=data_folder,
                only=tuple(only or ()),
                overrides=Overrides(
                    model=model,
                    device=device,
                    limit=limit,
                    batch_size=batch_size,
                    trust_remote_code=trust_remote_code,
                ),
            )
        if check:
            if json_output:
                raise StudyError("--check makes no table that --json could print; leave out one of the two")
            _show_plan(planned)
            return
        from kvprune.comparison.display.console import progress_bar

        with redirect_stdout(sys.stderr), progress_bar() as on_progress:
            table = run_study(planned, on_progress, say)
    if json_output:
        print(printable_json(table.to_dict()))
    else:
        _show_table(table)


def _listing() -> Table:
    """Return the studies that come with kvprune; a file that is damaged is an error."""
    from kvprune.comparison.studies.plan import model_name
    from kvprune.comparison.studies.study import built_in_studies, read_study

    table = make_table("study", "model", "data sets", "status")
    table.columns[1].overflow = "fold"
    for name, path in built_in_studies().items():
        found = read_study(path)
        cells = (
            name,
            model_name(found.settings, found.data[0].metric),
            ", ".join(one.title for one in found.data),
            found.status or "",
        )
        table.add_row(*map(printable, cells))
    return table


def _show_plan(planned: Plan) -> None:
    """Print what would run: one line for each data set, then the configurations and the notes."""
    from rich.text import Text

    from kvprune.comparison.studies.plan import model_name

    console = make_console()
    first = planned.parts[0].settings
    table = make_table("data set", "metric", "file", "examples", "answers there", "source")
    for column in table.columns[1:]:
        column.overflow = "fold"
    for part in planned.parts:
        there = part.there
        cells = (
            part.data.title,
            part.data.metric,
            str(part.settings.data),
            str(part.examples),
            "none" if there is None else f"{there.answers} of {there.answers + there.missing}",
            part.data.source or "",
        )
        table.add_row(*map(printable, cells))
    answers = len(planned.configurations) * sum(part.examples for part in planned.parts)
    more = ", and those of further draws of policies that draw at random" * (first.draws > 1)
    lines = [
        planned.study.title,
        *([f"Status: {planned.study.status}."] if planned.study.status else []),
        f"Model: {model_name(first, planned.parts[0].data.metric)} ({first.dtype}), "
        f"batches of {first.batch_size}.",
        f"Configurations: {', '.join(one.spec for one in planned.configurations)}.",
        f"{answers} answers in all{more}. Nothing was run.",
        *planned.study.notes,
    ]
    console.print(table)
    console.print()
    for line in lines:
        console.print(Text(printable(line)))


def _show_table(table: StudyTable) -> None:
    from rich.text import Text

    from kvprune.comparison.studies.run import CSV, JSON, MARKDOWN

    console = make_console()
    console.print(Text(printable(table.plan.study.title)))
    console.print()
    shown = table.rich()
    narrow = console.measure(shown).maximum > console.width
    console.print(table.rich(intervals=False) if narrow else shown)
    console.print()
    if narrow:
        console.print(Text(f"Too narrow for intervals; a wider terminal, or {MARKDOWN}, shows them."))
    for note in table.notes():
        console.print(Text(note))
    files = f"{MARKDOWN}, {CSV} and {JSON}"
    console.print(Text(f"The table is in {printable(str(table.plan.output))}: {files}."), soft_wrap=True)
