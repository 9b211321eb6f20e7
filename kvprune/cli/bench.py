"""The commands that measure what a policy costs by itself: bench memory."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Annotated

import typer

from kvprune.cli.common import Debug, load_quietly, make_console, make_table, one_line_errors, say
from kvprune.errors import KVPruneError
from kvprune.text import printable, printable_json

if TYPE_CHECKING:
    from kvprune.policy.base import CrossKVPolicy
    from kvprune.session.registry import Registry
    from kvprune.testing.cost import MemoryReport

__all__ = ["bench", "memory"]

bench = typer.Typer(no_args_is_help=True, help="Measure what one decision of a policy costs.")

_MIB = 2**20


@bench.callback()
def _group() -> None:
    """Measure what one decision of a policy costs."""


@bench.command()
def memory(
    policy: Annotated[
        list[str] | None,
        typer.Option(help="Spec such as trim:k_ratio=0.1; repeatable. Default: every installed policy."),
    ] = None,
    device: Annotated[str, typer.Option(help="Device: cpu or cuda.")] = "cpu",
    repetitions: Annotated[int, typer.Option(help="Repetitions of the timing; 0 turns it off.")] = 3,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the measurements as JSON on standard output.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Measure peak extra memory and seconds of one decision, or of one decode step.

    The decision has the dimensions of Llama-3.2-11B-Vision.
    """
    with one_line_errors(debug):
        from kvprune.comparison.display.console import progress_bar
        from kvprune.comparison.plan.settings import Progress
        from kvprune.testing.cost import measure_all

        if device.partition(":")[0] not in ("cpu", "cuda"):
            raise KVPruneError(f"unknown device {device!r}; choose cpu or cuda")
        found = load_quietly()
        policies = [found.get_policy(spec) for spec in policy] if policy else _installed(found)
        with redirect_stdout(sys.stderr), progress_bar() as bar:  # plugins may print
            report = measure_all(
                policies,
                device=device,
                repetitions=repetitions,
                on_progress=lambda done, total: bar(Progress("measuring", done, total)),
            )
    if json_output:
        print(printable_json(report.to_dict()))
    else:
        _print(report)


def _installed(found: Registry) -> list[CrossKVPolicy]:
    """Return every installed policy with default options; report those that need options as left out.

    Where default options do not fit every model, it has those of `CrossKVPolicy.on_any_model`.
    """
    from kvprune.policy.spec import PolicySpec

    policies = []
    for name in sorted(found.policies):
        try:
            options = found.policies[name].cls.on_any_model
            policies.append(found.get_policy(PolicySpec(name, options)))
        except KVPruneError as error:
            say(printable(f"left out: {error}", 400))
    return policies


def _print(report: MemoryReport) -> None:
    """Print one row per policy: MiB and seconds for each dtype."""
    dtypes = list(dict.fromkeys(one.dtype for one in report.measurements))
    table = make_table("policy", *(f"MiB, {dtype}" for dtype in dtypes), *(f"s, {dtype}" for dtype in dtypes))
    for column in table.columns[1:]:
        column.justify = "right"
    by_spec = {(one.spec, one.dtype): one for one in report.measurements}
    for spec in dict.fromkeys(one.spec for one in report.measurements):
        row = [by_spec[spec, dtype] for dtype in dtypes]
        cells = [f"{one.peak_bytes / _MIB:.1f}" for one in row] + [
            "-" if one.seconds is None else f"{one.seconds:.3f}" for one in row
        ]
        table.add_row(printable(spec), *cells)
    make_console().print(table)
    size = report.dimensions
    print(
        f"\nOne decision: {size.columns} encoder tokens, {size.rows} text rows, "
        f"{size.query_heads} query heads, {size.kv_heads} KV heads of width {size.width}.\n"
        "MiB: most memory held at once beside the inputs. "
        f"s: {f'median of {report.repetitions} repetitions' if report.repetitions else 'not timed'}.\n"
        f"{report.date}, {report.machine}, " + ", ".join(f"{k} {v}" for k, v in report.versions.items()) + "."
    )
