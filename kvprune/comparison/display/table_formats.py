"""Records and tables in formats that other programs read: CSV, Parquet, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvprune.comparison.display.records import Record, Value
from kvprune.text import printable

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["latex", "markdown", "to_csv", "to_markdown", "to_parquet"]

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet may run a cell that begins like this."""

_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#~$&@!])")
_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "`": r"\textasciigrave{}",
    "'": r"\textquotesingle{}",
    "-": "-{}",
    "[": "{[}",
    "]": "{]}",
}


def to_csv(records: Sequence[Record]) -> str:
    r"""Return records as CSV (RFC 4180: comma, double quotes, lines end in CR LF), with a line of headings.

    Numbers keep all digits, and what is not known is empty. Text that does not print is escaped as in Python.
    Text that a spreadsheet could take for a formula gets a ' in front.
    """
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\r\n")
    names = list(records[0])
    writer.writerow([_csv_cell(name) for name in names])
    writer.writerows([[_csv_cell(record[name]) for name in names] for record in records])
    return target.getvalue()


def to_parquet(records: Sequence[Record], metadata: Mapping[str, str]) -> bytes:
    """Return records as a Parquet file.

    Args:
        records: The records; text is kept as it is, except for lone surrogates, which are escaped.
        metadata: Added to the metadata of the schema.

    Raises:
        ModuleNotFoundError: If pyarrow is missing; the message says how to install it.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'Parquet needs pyarrow, which is not installed: pip install "kvprune[export]"', name="pyarrow"
        ) from error
    names = list(records[0])
    found = {_utf8(name): _column([_parquet_value(record[name]) for record in records], pa) for name in names}
    table = pa.table(found).replace_schema_metadata({k: _utf8(v) for k, v in metadata.items()})
    target = io.BytesIO()
    parquet.write_table(table, target)
    return target.getvalue()


def to_markdown(records: Sequence[Record]) -> str:
    """Return records as a pipe table of GitHub-flavoured Markdown."""
    names = list(records[0])
    cells = [[_plain(record[name]) for name in names] for record in records]
    return pipe_table(names, cells, [not isinstance(records[0][name], str) for name in names])


def pipe_table(headings: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool]) -> str:
    """Return a pipe table.

    Args:
        headings: Heading of each column, not escaped yet.
        rows: Cells, not escaped yet.
        right: Whether each column is aligned to the right.
    """
    lines = [
        " | ".join(markdown(text) for text in headings),
        " | ".join("---:" if one else "---" for one in right),
        *(" | ".join(markdown(text) for text in row) for row in rows),
    ]
    return "".join(f"| {line} |\n" for line in lines)


def markdown(text: str) -> str:
    """Return text that Markdown shows as it is: no markup, no link, no mention, no :emoji:, on one line."""
    text = _MARKDOWN.sub(r"\\\1", printable(text))
    text = re.sub(r":(?=//|[A-Za-z+\\-][A-Za-z0-9+\\_-]*:)", r"\\:", text)
    return re.sub(r"\b(www)\.", r"\1\\.", text)


def latex(text: str) -> str:
    """Return text that LaTeX sets as it is; letters that pdfLaTeX lacks become their number."""
    return "".join(_LATEX.get(char) or _latex_letter(char) for char in printable(text))


def _latex_letter(char: str) -> str:
    if char.isascii():
        return char
    if unicodedata.category(char) == "Zs":
        return " "
    common = ord(char) < 0x180 and unicodedata.category(char).startswith("L")
    return char if common else f"{{[}}U+{ord(char):04X}{{]}}"


def _csv_cell(value: Value) -> str:
    if not isinstance(value, str):
        return _plain(value)
    text = printable(value)
    return f"'{text}" if text.startswith(_FORMULA) or value.startswith(_FORMULA) else text


def _plain(value: Value) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else repr(value)


def _column(values: list[Value], pa: Any) -> pa.Array:
    """Return a column; whole numbers beside fractions become fractions, and nothing at all a number."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float}:
        whole = kinds == {int}
        return pa.array(values, type=pa.int64() if whole else pa.float64())
    return pa.array(values, type=pa.bool_() if kinds == {bool} else pa.string())


def _parquet_value(value: Value) -> Value:
    return _utf8(value) if isinstance(value, str) else value


def _utf8(text: str) -> str:
    """Return text without lone surrogates, which no file format of Unicode can hold."""
    return text.encode("utf-8", "backslashreplace").decode()
