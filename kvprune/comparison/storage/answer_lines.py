"""The lines of results.jsonl: written, read quickly, and told apart by whether they belong to the grid."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from kvprune.comparison.storage.addresses import UNIT_DIGITS
from kvprune.comparison.storage.answers import Answer, Key, Transcript, from_row, to_row
from kvprune.comparison.storage.growth import Reasons
from kvprune.comparison.storage.journal import parse_line
from kvprune.comparison.storage.recorded_grid import Earlier, RecordedGrid
from kvprune.errors import ResultsError

__all__ = ["UNIT", "LineReader", "StoredAnswer", "answer_rows", "current", "read_line"]

UNIT = "unit"
"""Field of a line that holds the address of the unit that the answer belongs to."""

_TEXT = r'"([^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*)"'
_WHOLE = r"(-?(?:0|[1-9][0-9]{0,17}))"
_PATTERNS = {
    "str": _TEXT,
    "bool": "(true|false)",
    "int": _WHOLE,
    "int | None": f"(?:null|{_WHOLE})",
    "hex": '"([0-9a-f]{64})"',
    "float": r"([01]\.[0-9]{1,20})",
    "float | None": r"([01]\.[0-9]{1,20})",
}
_UNIT = re.compile(f"[0-9a-f]{{{UNIT_DIGITS}}}")


def answer_rows(unit: str, answers: Iterable[Answer]) -> list[dict[str, Any]]:
    """Return the JSON objects that stand for the answers of one unit in results.jsonl."""
    return [{UNIT: unit, **to_row(answer)} for answer in answers]


class StoredAnswer(NamedTuple):
    """A line of results.jsonl.

    Attributes:
        unit: address of the unit that the answer belongs to.
        answer: the answer.
    """

    unit: str
    answer: Answer


class _Sizes(dict[str, int]):
    """Whole numbers by how they are written; each is made once."""

    def __missing__(self, text: str) -> int:
        return self.setdefault(text, int(text))


class _Fractions(dict[str, float]):
    """Floats by how they are written; each is made once."""

    def __missing__(self, text: str) -> float:
        return self.setdefault(text, float(text))


class LineReader:
    """Reads lines of results.jsonl; strings and numbers that come again are held once.

    A line in the form that kvprune writes is taken apart by a regular expression, which is several times
    faster than the strict parser. Any other line goes through the strict parser, with the same result.
    """

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._fractions, self._sizes = _Fractions(), _Sizes()

    def read(self, where: str, number: int, line: bytes) -> StoredAnswer:
        """Read one line.

        Args:
            where: Name of the file, for messages.
            number: Number of the line, for messages.
            line: The line without its line break.

        Raises:
            ResultsError: If the line is damaged.
        """
        return self._quick(line) or read_line(f"{where}, line {number}", line)

    def _quick(self, line: bytes) -> StoredAnswer | None:
        """Return what `read_line` would return, or None where only `read_line` can say."""
        try:
            text = line.decode()
            kind: type[Answer] = Answer
            found = _ANSWER.fullmatch(text)
            if found is None:
                kind, found = Transcript, _TRANSCRIPT.fullmatch(text)
            if found is None:
                return None
            (
                unit,
                spec,
                seed,
                name,
                task,
                said,
                right,
                agrees,
                ended,
                kept,
                held,
                full,
                receipt,
                read,
                *more,
            ) = found.groups()
            if "\\" in text:
                spec, name, task, said = map(_unescaped, (spec, name, task, said))
        except ValueError:
            return None
        once, sizes = self._texts.setdefault, self._sizes
        answer = kind(
            spec=once(spec, spec),
            seed=None if seed is None else sizes[seed],
            id=once(name, name),
            task=once(task, task),
            answer=once(said, said) if len(said) <= _SHORT else said,
            correct=right == "true",
            agrees_with_full=agrees == "true",
            finished=ended == "true",
            kept_fraction=self._fractions[kept],
            bytes_held=sizes[held],
            bytes_full=sizes[full],
            receipt=receipt,
            read_fraction=None if read is None else self._fractions[read],
            **(self._more(more) if more else {}),
        )
        if (
            max(answer.kept_fraction, answer.read_fraction or 0) > 1
            or answer.bytes_held < 0
            or answer.bytes_full < 0
        ):
            return None
        return StoredAnswer(once(unit, unit), answer)

    def _more(self, values: Sequence[str]) -> dict[str, Any]:
        """Return the fields that a transcript has besides those of an answer."""
        *counts, loops = values
        return dict(zip(_MORE, (*(self._sizes[count] for count in counts), loops == "true"), strict=True))


def _unescaped(text: str) -> str:
    """Return what a JSON string stands for, given what is between its quotation marks."""
    plain: str = json.loads(f'"{text}"')
    plain.encode()  # raises for half a surrogate pair, as the strict parser does
    return plain


def read_line(where: str, line: bytes) -> StoredAnswer:
    """Read one line with the strict parser.

    Args:
        where: Name of the file and number of the line, for messages.
        line: The line without its line break.

    Raises:
        ResultsError: If the line is damaged.
    """
    row = parse_line(where, line)
    unit = row.pop(UNIT, None)
    if not isinstance(unit, str) or not _UNIT.fullmatch(unit):
        raise ResultsError(
            f"{where} is damaged: field {UNIT!r} is {unit!r:.80}, not {UNIT_DIGITS} hexadecimal digits; "
            "delete this line"
        )
    return StoredAnswer(unit, from_row(where, row))


def current(
    where: str, lines: Iterable[StoredAnswer], grid: RecordedGrid, earlier: Sequence[Earlier]
) -> tuple[dict[Key, Answer], dict[str, int]]:
    """Return the answers of a grid, and how many others there are, by reason.

    Args:
        where: Name of the file, for messages.
        lines: Its finished lines, in order.
        grid: The grid.
        earlier: What earlier grids had in place of what it has now, in order.

    Raises:
        ResultsError: If a line appears twice, or its spec, seed or example is not that of its unit, or it is
            not of the kind of the grid.
    """
    addresses, reasons = grid.addresses(), Reasons(grid, earlier)
    kind = Transcript if grid.context["kind"] == "speech" else Answer
    found: dict[Key, Answer] = {}
    old: dict[str, int] = {}
    seen: set[tuple[str, str]] = set()
    last, unit = "", None
    for number, line in enumerate(lines, start=1):
        answer = line.answer
        if line.unit != last:
            last, unit = line.unit, addresses.find(line.unit)
        if unit is None:
            reason = reasons.of(line.unit, answer.seed)
            old[reason] = old.get(reason, 0) + 1
            twice = (line.unit, answer.id) in seen
            seen.add((line.unit, answer.id))
        else:
            if answer.spec != unit.spec or answer.seed != unit.seed or answer.id not in unit.ids:
                raise ResultsError(
                    f"{where}, line {number}: spec {answer.spec!r} with seed {answer.seed} and example "
                    f"{answer.id!r} is not part of unit {line.unit}; delete this line"
                )
            if type(answer) is not kind:
                raise ResultsError(
                    f"{where}, line {number} is damaged: it is of the kind {type(answer).__name__}, not "
                    f"{kind.__name__}; delete this line"
                )
            twice = answer.key in found
            found[answer.key] = answer
        if twice:
            raise ResultsError(
                f"{where}, line {number}: spec {answer.spec!r} with example {answer.id!r} "
                "appears twice; delete one of the two lines"
            )
    return found, old


def _pattern(kind: type[Answer]) -> re.Pattern[str]:
    """Return what matches a line as `answer_rows` and `Journal.append` write it; one group for each value."""
    parts = [f'"{UNIT}": "({_UNIT.pattern})"']
    for one in fields(kind):
        pattern = _PATTERNS["hex" if one.name == "receipt" else str(one.type)]
        part = f', "{one.name}": {pattern}'
        parts.append(f"(?:{part})?" if one.name == "read_fraction" else part)
    return re.compile("{" + "".join(parts) + "}")


_SHORT = 64
"""Longer texts do not come again."""

_ANSWER, _TRANSCRIPT = _pattern(Answer), _pattern(Transcript)
_MORE = [field.name for field in fields(Transcript)][len(fields(Answer)) :]
