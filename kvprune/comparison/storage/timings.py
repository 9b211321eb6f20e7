"""Measured times as a results folder holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvprune.errors import ResultsError

__all__ = ["TIMED_TOKENS", "Lap", "read_laps"]


TIMED_TOKENS = 64
"""Tokens of a timed answer: the first one is prefill, the others are decoding."""


_LONGEST = 1e9
"""Seconds; what is longer is damage, not patience."""


@dataclass(frozen=True, slots=True)
class Lap:
    """Seconds of two calls of `generate`, one after the other.

    Attributes:
        first: for one new token.
        all: for `TIMED_TOKENS` new tokens.
    """

    first: float
    all: float

    @property
    def per_token(self) -> float:
        """Seconds per token after the first."""
        return (self.all - self.first) / (TIMED_TOKENS - 1)


def read_laps(
    where: str, rows: Sequence[Mapping[str, Any]], specs: Sequence[str]
) -> dict[int, dict[str | None, Lap]]:
    """Return laps by repetition and spec, those of the untouched model under None.

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
    raise ValueError(f"{value!r:.40} is no pair of seconds")
