"""Exports a results folder: rows or answers, as CSV, Parquet, Markdown or LaTeX."""

from __future__ import annotations

from dataclasses import asdict

from kvprune.comparison.display.paper import latex_table, markdown_table
from kvprune.comparison.display.records import answer_records, provenance, row_records
from kvprune.comparison.display.table_formats import to_csv, to_markdown, to_parquet
from kvprune.comparison.statistics.stored_summary import summary_of
from kvprune.comparison.storage.stored_run import StoredRun
from kvprune.errors import KVPruneError, ResultsError
from kvprune.text import suggestion

__all__ = ["FORMATS", "export"]

FORMATS = ("csv", "parquet", "markdown", "latex")


def export(stored: StoredRun, form: str, *, answers: bool = False, against: str | None = None) -> bytes:
    """Return a results folder in another format.

    Args:
        stored: What `read_run` returned.
        form: One of `FORMATS`. csv and parquet have every field; markdown and latex have the table for a
            paper.
        answers: Export each answer, with the fields of results.jsonl, and not the rows of the table. A folder
            may then be unfinished.
        against: Policy that others are compared with; None is the one that the folder records.

    Raises:
        KVPruneError: If there is no such format, or no such table in it.
        ResultsError: If there is nothing to export yet.
        ModuleNotFoundError: If an optional dependency is missing.
    """
    if form not in FORMATS:
        raise KVPruneError(
            f"unknown format {form!r}; choose from {', '.join(FORMATS)}{suggestion(form, FORMATS)}"
        )
    if answers and form == "latex":
        raise KVPruneError("answers make no table for a paper; export them as csv, parquet or markdown")
    made = provenance(stored)
    if answers:
        if not stored.answers:
            raise ResultsError(f"{stored.folder} holds no answers yet")
        records = answer_records(stored.answers.values())
    else:
        summary = summary_of(stored, against)
        if form in ("markdown", "latex"):
            text = (markdown_table if form == "markdown" else latex_table)(summary, made)
            return _encoded(text)
        records = row_records(summary)
    if form == "parquet":
        return to_parquet(records, asdict(made))
    return _encoded(to_csv(records) if form == "csv" else to_markdown(records))


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")
