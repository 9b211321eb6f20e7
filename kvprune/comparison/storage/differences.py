"""How two JSON trees differ, in sentences."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence

from kvprune.text import printable

__all__ = ["differences", "in_one_sentence"]

_NAMED = 3
"""How many differences a sentence names."""


def differences(old: object, new: object, *, tolerance: float = 0.0, where: str = "") -> Iterator[str]:
    """Yield a sentence for every value in which two JSON trees differ.

    Args:
        old: The first tree, called "was" in the sentences.
        new: The second tree, called "is now".
        tolerance: Relative difference up to which floats count as equal.
        where: Path of both trees inside a larger tree, for the sentences.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            path = f"{where}.{key}" if where else str(key)
            if key not in old or key not in new:
                yield f"{path} was {_show(old.get(key))} and is now {_show(new.get(key))}"
            else:
                yield from differences(old[key], new[key], tolerance=tolerance, where=path)
    elif isinstance(old, list) and isinstance(new, list):
        for number, (one, other) in enumerate(zip(old, new, strict=False)):
            yield from differences(one, other, tolerance=tolerance, where=f"{where}[{number}]")
        if len(old) != len(new):
            longer = old if len(old) > len(new) else new
            extra = _show(longer[min(len(old), len(new))])
            yield f"{where} had {len(old)} entries and now has {len(new)} (first extra: {extra})"
    elif not _same(old, new, tolerance):
        yield f"{where} was {_show(old)} and is now {_show(new)}"


def in_one_sentence(found: Sequence[str]) -> str:
    """Return the first few differences, and how many more there are."""
    more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return "; ".join(found[:_NAMED]) + more


def _same(old: object, new: object, tolerance: float) -> bool:
    if isinstance(old, bool) or isinstance(new, bool):
        return old is new
    if isinstance(old, float | int) and isinstance(new, float | int):
        return old == new or math.isclose(old, new, rel_tol=tolerance, abs_tol=0.0)
    return old == new


def _show(value: object) -> str:
    return printable(json.dumps(value, ensure_ascii=False), 80)
