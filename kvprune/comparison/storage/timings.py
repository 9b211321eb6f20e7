"""The lines of timings.jsonl: measured times, written and read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvprune.comparison.plan.grid import REFERENCE
from kvprune.comparison.storage.addresses import Addresses, batch_key
from kvprune.errors import ResultsError

__all__ = ["TIMED_TOKENS", "Lap", "Laps", "Timings", "laps_to_row", "read_timings", "timing_row"]


TIMED_TOKENS = 32
"""New tokens of a timed answer: prefill gives the first one, decoding the others."""


_LONGEST = 1e9
"""Seconds; a longer time in a file means that the file is damaged."""


@dataclass(frozen=True, slots=True)
class Lap:
    """The times of one call of `generate`, from its start.

    Attributes:
        first: seconds until the first new token.
        all: seconds until `TIMED_TOKENS` new tokens.
        guide: seconds of these that a guide took; 0 where there was none.
        guide_bytes: most bytes of cross-attention cache that the guide held, divided by the examples.
    """

    first: float
    all: float
    guide: float = 0.0
    guide_bytes: int = 0

    @property
    def per_token(self) -> float:
        """Seconds per token after the first."""
        return (self.all - self.first) / (TIMED_TOKENS - 1)


Laps = Mapping[str | None, Lap]
"""The times of one repetition by spec, those of the untouched model under None."""


@dataclass(frozen=True, kw_only=True)
class Timings:
    """The times that a results folder holds.

    Attributes:
        laps: times of the present grid by repetition, in file order. Repetitions may time different
            configurations; each times the full cache and the untouched model.
        next: a number above those of all repetitions in the file.
        examples: ids of the examples of the batch that was timed; None where nothing was timed.
        old: repetitions that were timed with other ingredients.
    """

    laps: Mapping[int, Laps]
    next: int
    examples: tuple[str, ...] | None
    old: int


def laps_to_row(repetition: int, laps: Laps) -> dict[str, Any]:
    """Return the measured part of the JSON object that stands for one repetition in timings.jsonl.

    Args:
        repetition: Number of the repetition.
        laps: Times by spec, those of the untouched model under None.
    """
    times = {
        spec: [lap.first, lap.all, *([lap.guide, lap.guide_bytes] if lap.guide else [])]
        for spec, lap in laps.items()
    }
    stock = times.pop(None)
    return {"repetition": repetition, "stock": stock, "policies": times}


def timing_row(
    measured: Mapping[str, Any], addresses: Addresses, ids: Sequence[str], digests: Mapping[str, str]
) -> dict[str, Any]:
    """Add to what `laps_to_row` made the ingredients that the times depend on.

    Args:
        measured: What `laps_to_row` returned.
        addresses: The addresses of the grid.
        ids: Ids of the examples of the timed batch.
        digests: Digests of the grid's examples by id.
    """
    return {
        **measured,
        "keys": {spec: addresses.policies[spec] for spec in measured["policies"]},
        "context": addresses.context,
        "examples": list(ids),
        "batch": batch_key([digests[name] for name in ids], None),
    }


def read_timings(
    where: str, rows: Sequence[Mapping[str, Any]], addresses: Addresses, digests: Mapping[str, str]
) -> Timings:
    """Read the rows of timings.jsonl; times that were taken with other ingredients are only counted.

    Args:
        where: Name of the file, for messages.
        rows: JSON objects that `timing_row` made.
        addresses: The addresses of the grid.
        digests: Digests of the grid's examples by id.

    Raises:
        ResultsError: If a row is damaged, or a repetition appears twice.
    """
    laps: dict[int, Laps] = {}
    numbers: set[int] = set()
    examples: tuple[str, ...] | None = None
    for number, row in enumerate(rows, start=1):
        try:
            repetition = row["repetition"]
            if isinstance(repetition, bool) or not isinstance(repetition, int) or repetition in numbers:
                raise ValueError(f"repetition is {repetition!r:.40}")
            numbers.add(repetition)
            timed, keys, ids = _read_times(row["policies"]), row["keys"], _read_ids(row["examples"])
            if REFERENCE not in timed:
                raise ValueError(f"it does not time {REFERENCE!r}")
            if not isinstance(keys, dict) or set(keys) != set(timed):
                raise ValueError("its keys are not those of its times")
            own: dict[str | None, Lap] = {None: _read_lap(row["stock"])}
            own |= {spec: lap for spec, lap in timed.items() if addresses.policies.get(spec) == keys[spec]}
            context, batch = row["context"], row["batch"]
        except (KeyError, TypeError, ValueError) as error:
            raise ResultsError(f"{where}, line {number} is damaged ({error!r}); delete this line") from error
        known = all(name in digests for name in ids)
        if context == addresses.context and known and batch == batch_key([digests[i] for i in ids], None):
            laps[repetition] = own
            examples = ids
    return Timings(
        laps=laps, next=max(numbers, default=-1) + 1, examples=examples, old=len(numbers) - len(laps)
    )


def _read_times(value: object) -> dict[str, Lap]:
    if not isinstance(value, dict):
        raise TypeError(f"policies is {value!r:.40}")
    return {spec: _read_lap(lap) for spec, lap in value.items()}


def _read_ids(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise TypeError(f"examples is {value!r:.40}")
    return tuple(value)


def _read_lap(value: object) -> Lap:
    if (
        isinstance(value, list)
        and len(value) in (2, 4)
        and all(isinstance(one, float | int) and not isinstance(one, bool) for one in value)
        and all(0 < one < _LONGEST for one in value[:3])
        and all(isinstance(one, int) and one >= 0 for one in value[3:])
    ):
        return Lap(*value)
    raise ValueError(f"{value!r:.40} is not a pair of seconds, with or without the cost of a guide")
