"""The lines of results.jsonl: each is the answer of one configuration to one example."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from kvprune.errors import ResultsError
from kvprune.text import shown

__all__ = ["Answer", "Key", "Transcript", "from_row", "to_row"]

Key = tuple[str, int | None, str]
"""Spec, seed (None where nothing is drawn) and id of an example."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer of one configuration to one example.

    Attributes:
        spec: canonical spec of the policy.
        seed: the seed that the policy drew with; None where it drew nothing.
        id: id of the example.
        task: task of the example.
        answer: the decoded text.
        correct: whether the text is one of the right answers.
        agrees_with_full: whether the text equals what the full cache answered to the same example.
        finished: whether the model ended the answer itself, before the limit on new tokens.
        kept_fraction: fraction of visible tokens kept for decoding, 0..1.
        bytes_held: bytes of the batch's cross-attention cache, divided by the examples of the batch.
        bytes_full: bytes that stock transformers would hold, divided in the same way.
        receipt: SHA-256 of what was kept for this example; see `receipts`.
        read_fraction: fraction of visible tokens that a decode step reads, mean over the batch, if the policy
            chooses that in each step; None if it reads all that is kept.
    """

    spec: str
    seed: int | None = None
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
    read_fraction: float | None = None

    @property
    def key(self) -> Key:
        """What tells this answer from all others of a run."""
        return self.spec, self.seed, self.id


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript(Answer):
    """The transcript of one recording; `correct` says that no word of it is wrong.

    Errors are counted after normalisation: words or characters that were substituted, deleted or inserted.

    Attributes:
        word_errors: errors in words.
        words: words of the reference.
        character_errors: errors in characters.
        characters: characters of the reference.
        tokens: new tokens of the answer, up to `cap`.
        cap: limit on new tokens; see `kvprune.comparison.execution`.
        loops: whether the answer repeats itself endlessly.
    """

    word_errors: int
    words: int
    character_errors: int
    characters: int
    tokens: int
    cap: int
    loops: bool


def to_row(answer: Answer) -> dict[str, Any]:
    """Return the JSON object that stands for `answer` in results.jsonl."""
    row = asdict(answer)
    if answer.read_fraction is None:
        del row["read_fraction"]
    return row


def from_row(where: str, row: Mapping[str, Any]) -> Answer:
    """Read what `to_row` wrote.

    Args:
        where: Name of the file and number of the line, for messages.
        row: The JSON object.

    Raises:
        ResultsError: If a field is missing, unknown, of another type or out of range.
    """
    kind = Transcript if "words" in row else Answer
    wanted = {field.name: str(field.type) for field in fields(kind)}
    if row.get("read_fraction") is None:
        del wanted["read_fraction"]
    if set(row) != set(wanted):
        odd = sorted(set(row) ^ set(wanted))[0]
        problem = "is missing" if odd in wanted else "is unknown"
        raise ResultsError(f"{where} is damaged: field {odd!r} {problem}; delete this line")
    types: dict[str, type | tuple[type, ...]] = {"str": str, "bool": bool, "int": int, "float": (int, float)}
    types |= {"int | None": (int, type(None)), "float | None": (int, float)}
    for name, wanted_type in wanted.items():
        value = row[name]
        if not isinstance(value, types[wanted_type]) or (isinstance(value, bool) and wanted_type != "bool"):
            raise ResultsError(
                f"{where} is damaged: field {name!r} is {shown(value, 80)}, not a {wanted_type}; "
                "delete this line"
            )
    answer = kind(**row)
    for name, good, right in (
        ("kept_fraction", 0 <= answer.kept_fraction <= 1, "between 0 and 1"),
        ("read_fraction", 0 <= (answer.read_fraction or 0) <= 1, "between 0 and 1"),
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
