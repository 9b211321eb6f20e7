"""Strict JSON: no duplicate keys, no NaN, no lone surrogates, no deep nesting."""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["parse"]

_DEEPEST = 50
"""The most levels of nesting; files that kvprune writes have six."""


def parse(text: bytes | str) -> Any:
    """Return the value of a JSON text.

    Args:
        text: UTF-8 bytes, or text.

    Raises:
        ValueError: If the text is not JSON or not UTF-8, repeats a key in an object, holds NaN, an infinity
            (also as `1e999`) or half a surrogate pair, or is nested more than 50 levels deep. No other error
            is raised, whatever the text is.
    """
    try:
        value = json.loads(
            text.decode() if isinstance(text, bytes) else text,
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
        )
    except RecursionError:
        raise ValueError(f"nested more than {_DEEPEST} levels deep") from None
    _check(value, _DEEPEST)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for number, key in enumerate(keys) if key in keys[:number])
        raise ValueError(f"key {twice[:60]!r} appears twice in one object")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _check(value: object, room: int) -> None:
    """Check a value that may have at most `room` more levels of nesting."""
    if isinstance(value, str):
        value.encode()  # raises for half a surrogate pair, which could not be written again
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number is too large for a float")
    elif isinstance(value, dict | list):
        if not room:
            raise ValueError(f"nested more than {_DEEPEST} levels deep")
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            _check(part, room - 1)
