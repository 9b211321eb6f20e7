"""Runs a command of kvprune in this process."""

from __future__ import annotations

from typer.testing import CliRunner

from kvprune.cli import app

runner = CliRunner()


def kvprune_command(*arguments: str, code: int = 0) -> str:
    """Run a command and return its standard output, and its standard error where it must fail."""
    result = runner.invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr
