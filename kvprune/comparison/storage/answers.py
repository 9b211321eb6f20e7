"""One answer of one configuration to one example, and the line of results.jsonl that stands for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from kvprune.errors import ResultsError
from kvprune.text import shown

__all__ = ["Answer", "from_row", "to_row"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One line of results.jsonl: what one configuration answered to one example.

    Attributes:
        spec: canonical spec of the policy.
        id: of the example.
        task: of the example.
        answer: decoded text.
        correct: whether it is one of the right answers.
        agrees_with_full: whether it equals what the full cache answered to the same example.
        finished: whether the model ended the answer itself, before the limit on new tokens.
        kept_fraction: fraction of visible tokens kept for decoding.
        bytes_held: this example's share of the cross-attention cache of its batch, in bytes.
        bytes_full: the same share in stock transformers, in bytes.
        receipt: SHA-256 of what was kept for this example; see `receipts`.
    """

    spec: str
    id: str
    task: str
    answer: str
    correct: bool
    agrees_with_full: bool
    finished: bool
    kept_fraction: float
    bytes_held: int
    bytes_full: int
    receipt: str


def to_row(answer: Answer) -> dict[str, Any]:
    """Return the JSON object that stands for `answer` in results.jsonl."""
    return asdict(answer)


def from_row(where: str, row: Mapping[str, Any]) -> Answer:
    """Read what `to_row` wrote.

    Args:
        where: File and line, for messages.
        row: The JSON object.

    Raises:
        ResultsError: If a field is missing, unknown, of another type or out of range.
    """
    wanted = {field.name: str(field.type) for field in fields(Answer)}
    if set(row) != set(wanted):
        odd = sorted(set(row) ^ set(wanted))[0]
        problem = "is missing" if odd in wanted else "is unknown"
        raise ResultsError(f"{where} is damaged: field {odd!r} {problem}; delete this line")
    types: dict[str, type | tuple[type, ...]] = {"str": str, "bool": bool, "int": int, "float": (int, float)}
    for name, kind in wanted.items():
        value = row[name]
        if not isinstance(value, types[kind]) or (isinstance(value, bool) and kind != "bool"):
            raise ResultsError(
                f"{where} is damaged: field {name!r} is {shown(value, 80)}, not a {kind}; delete this line"
            )
    answer = Answer(**row)
    for name, good, right in (
        ("kept_fraction", 0 <= answer.kept_fraction <= 1, "between 0 and 1"),
        ("bytes_held", 0 <= answer.bytes_held < _MOST_BYTES, "a number of bytes"),
        ("bytes_full", 0 <= answer.bytes_full < _MOST_BYTES, "a number of bytes"),
        ("receipt", _RECEIPT.fullmatch(answer.receipt) is not None, "64 hexadecimal digits"),
    ):
        if not good:
            raise ResultsError(
                f"{where} is damaged: field {name!r} is {shown(row[name], 80)}, not {right}; delete this line"
            )
    return answer


_MOST_BYTES = 2**63
_RECEIPT = re.compile("[0-9a-f]{64}")
