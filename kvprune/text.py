"""Makes foreign text safe for messages and terminals: short, printable, and never an error itself.

Specs, docstrings, names and exceptions come from other people's code and may hold anything: a megabyte of
text, terminal escape sequences, or a ``__repr__`` that raises.
"""

from __future__ import annotations

import difflib
import inspect
import re
import unicodedata
from collections.abc import Iterable

__all__ = ["docstring", "error_line", "printable", "shown", "suggestion"]

_LONGEST_NAME = 64  # of names that get a suggestion; comparing longer ones takes long


def printable(text: str, limit: int | None = None, *, newlines: bool = False) -> str:
    r"""Escape characters that do not print: control characters, text-direction marks, lone surrogates.

    Args:
        text: Any text.
        limit: Length of the longest text that is returned; a longer one is cut in the middle, and a note says
            how much was left out if there is room for it.
        newlines: Whether to keep newlines as they are.

    Example:
        >>> print(printable("a\tb"))
        a\tb
    """
    if not text.isprintable():
        text = "".join(
            char
            if char.isprintable() or (newlines and char == "\n") or unicodedata.category(char) == "Zs"
            else char.encode("unicode_escape").decode()
            for char in text
        )
    if limit is None or len(text) <= limit:
        return text
    note = _elision(len(text))
    if 2 * len(note) > limit:  # the note would take more room than what it stands for
        note = "..."[:limit]
    room = limit - len(note)
    head, tail = room - room // 3, room // 3
    if note != "..."[:limit]:
        note = _elision(len(text) - room)  # not longer than before
    return text[:head] + note + text[len(text) - tail :]


def _elision(count: int) -> str:
    return f"...({count} characters left out)..."


def shown(value: object, limit: int = 200) -> str:
    """Return the repr of any value for a message: printable, and cut in the middle if it is long.

    Example:
        >>> shown("x" * 100, limit=30)
        "'xxxxxxxxxxxxxxxxx...xxxxxxxx'"
    """
    try:
        text = repr(value)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a foreign __repr__, deep nesting, or an int beyond Python's limit
        name = type(value).__name__
        bits = f" of {value.bit_length()} bits" if type(value) is int else ""
        text = f"<{name}{bits} that cannot be shown: {type(error).__name__}>"
    return printable(text, limit)


def error_line(error: BaseException, limit: int = 600) -> str:
    r"""Return an exception as one printable line, ``Type: message``, even if its ``__str__`` raises.

    Example:
        >>> error_line(ValueError("first line\nsecond line"))
        'ValueError: first line second line'
    """
    try:
        text = " ".join(str(error).split())
    except KeyboardInterrupt:
        raise
    except BaseException as second:
        text = f"its message cannot be shown: {type(second).__name__}"
    name = type(error).__name__
    return printable(f"{name}: {text}" if text else name, limit)


def suggestion(wrong: str, right: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest of the right names, or "" if none is close.

    Example:
        >>> suggestion("keep_raito", ["keep_ratio", "reach"])
        "; did you mean 'keep_ratio'?"
        >>> suggestion("zzz", ["keep_ratio", "reach"])
        ''
    """
    if not isinstance(wrong, str) or len(wrong) > _LONGEST_NAME:
        return ""
    close = difflib.get_close_matches(wrong, list(right), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def docstring(cls: type) -> str:
    """Return the docstring that the author of a class wrote, or "".

    The signature that `dataclasses.dataclass` writes into classes without a docstring does not count.
    """
    text = getattr(cls, "__doc__", None)
    if not isinstance(text, str) or re.fullmatch(rf"{re.escape(cls.__name__)}\(.*\)", text):
        return ""
    return inspect.cleandoc(text)
