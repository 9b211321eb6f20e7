"""The command that runs the conformance suite on a policy or an adapter: check."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from kvprune.cli.common import Debug, hide_warnings, make_console, make_table, one_line_errors
from kvprune.errors import ConformanceError, UnknownInvariantError
from kvprune.text import printable_json

__all__ = ["check"]


def check(
    policy: Annotated[
        str,
        typer.Argument(
            help="Name of an installed policy, which is checked with several budgets; or a spec such as "
            "trim:k_ratio=0.1, which is checked as it is; or the class name of an installed adapter or of a "
            "model that it supports."
        ),
    ],
    expect_failure: Annotated[
        list[str] | None,
        typer.Option(help="Invariant that must fail, and why, as ID=REASON; repeatable."),
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Invariants to check, separated by commas. Default: all.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for the generated problems.")] = 0,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON on standard output.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Check a policy or an adapter against the invariants.

    Tries to break the invariants KV01 to KV17, and a few promises about whole runs, on generated problems and
    tiny models.
    """
    with one_line_errors(debug):
        from kvprune.testing import check_adapter, check_policy
        from kvprune.testing.conformance import installed_adapter

        ids = None if only is None else [part.strip() for part in re.split("[,;]", only)]
        expected = dict(_expected_failure(text) for text in expect_failure or [])
        try:
            adapter = installed_adapter(policy)
            if adapter is None:
                report = check_policy(policy, only=ids, expected_failures=expected, seed=seed)
            else:
                with hide_warnings():  # some families warn at each call of `generate`
                    report = check_adapter(adapter, only=ids, expected_failures=expected, seed=seed)
        except ConformanceError as failure:
            report = failure.report
    if json_output:
        print(printable_json(report.to_dict()))
    else:
        table = make_table("id", "what", "outcome", "problems", "seconds")
        for result in report.results:
            row = (result.id, result.title, result.outcome, str(result.problems), f"{result.seconds:.1f}")
            table.add_row(*row)
        make_console().print(table)
        print("\n".join([*report.explanations, "", report.verdict]))
    raise typer.Exit(0 if report.passed else 1)


def _expected_failure(text: str) -> tuple[str, str]:
    invariant, equals, reason = (part.strip() for part in text.partition("="))
    if not equals or not reason:
        raise UnknownInvariantError(f"expected ID=REASON such as KV14='not nested', got {text!r}")
    return invariant, reason
