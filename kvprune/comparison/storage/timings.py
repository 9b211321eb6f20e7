"""The lines of timings.jsonl: measured times, written and read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvprune.errors import ResultsError

__all__ = ["TIMED_TOKENS", "Lap", "laps_to_row", "read_laps"]


TIMED_TOKENS = 64
"""New tokens of a timed answer: prefill gives the first one, decoding the others."""


_LONGEST = 1e9
"""Seconds; a longer time in a file means that the file is damaged."""


@dataclass(frozen=True, slots=True)
class Lap:
    """The times of two calls of `generate`, one after the other.

    Attributes:
        first: seconds for one new token.
        all: seconds for `TIMED_TOKENS` new tokens.
    """

    first: float
    all: float

    @property
    def per_token(self) -> float:
        """Seconds per token after the first."""
        return (self.all - self.first) / (TIMED_TOKENS - 1)


def laps_to_row(repetition: int, laps: Mapping[str | None, Lap]) -> dict[str, Any]:
    """Return the JSON object that stands for one repetition in timings.jsonl.

    Args:
        repetition: Number of the repetition.
        laps: Times by spec, those of the untouched model under None.
    """
    pairs = {spec: [lap.first, lap.all] for spec, lap in laps.items()}
    stock = pairs.pop(None)
    return {"repetition": repetition, "stock": stock, "policies": pairs}


def read_laps(
    where: str, rows: Sequence[Mapping[str, Any]], specs: Sequence[str]
) -> dict[int, dict[str | None, Lap]]:
    """Return times by repetition and spec, those of the untouched model under None.

    Args:
        where: Name of the file, for messages.
        rows: JSON objects that `laps_to_row` made.
        specs: Specs of the run's configurations.

    Raises:
        ResultsError: If a row is damaged or times other configurations.
    """
    found: dict[int, dict[str | None, Lap]] = {}
    for number, row in enumerate(rows, start=1):
        try:
            repetition, policies = row["repetition"], row["policies"]
            if isinstance(repetition, bool) or not isinstance(repetition, int) or repetition in found:
                raise ValueError(f"repetition is {repetition!r:.40}")
            if set(policies) != set(specs):
                raise ValueError("it times other configurations")
            laps: dict[str | None, Lap] = {None: _read_lap(row["stock"])}
            found[repetition] = laps | {spec: _read_lap(policies[spec]) for spec in specs}
        except (KeyError, TypeError, ValueError) as error:
            raise ResultsError(f"{where}, line {number} is damaged ({error!r}); delete this line") from error
    return found


def _read_lap(value: object) -> Lap:
    if (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(one, float | int) and not isinstance(one, bool) for one in value)
        and all(0 < one < _LONGEST for one in value)
    ):
        return Lap(*value)
    raise ValueError(f"{value!r:.40} is not a pair of seconds")
