"""Makes foreign text safe for messages and terminals: short, printable, and never an error itself.

Specs, docstrings, names and exceptions come from other people's code and may hold anything: a megabyte of
text, terminal escape sequences, or a ``__repr__`` that raises.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
import unicodedata
from collections.abc import Iterable

__all__ = [
    "REFERENCE",
    "docstring",
    "error_line",
    "is_printable",
    "printable",
    "printable_json",
    "shown",
    "suggestion",
]

REFERENCE = "reference, not a method"
"""What commands and tables say of a policy that reads the answer (`CrossKVPolicy.reads_answer`)."""

_LONGEST_NAME = 64  # of names that get a suggestion; comparing longer ones takes long


def printable(text: str, limit: int | None = None, *, newlines: bool = False) -> str:
    r"""Escape characters that do not print: control characters, text-direction marks, lone surrogates.

    Args:
        text: Any text.
        limit: A longer text is cut in the middle, and a note says how much was left out. With the note it is
            not longer than the limit, or if the limit is shorter than 60, than the limit and 30 more. A text
            that would not become shorter is returned whole.
        newlines: Whether to keep newlines as they are.

    Example:
        >>> print(printable("a\tb"))
        a\tb
    """
    if not text.isprintable():
        text = "".join(
            char
            if is_printable(char) or (newlines and char == "\n")
            else char.encode("unicode_escape").decode()
            for char in text
        )
    if limit is None or len(text) <= limit:
        return text
    note = len(_elision(len(text)))
    room = limit - note if limit >= 2 * note else limit  # a short limit counts the text alone
    head, tail = room * 2 // 3, room // 3
    cut = text[:head] + _elision(len(text) - head - tail) + text[len(text) - tail :]
    return cut if len(cut) < len(text) else text


def is_printable(text: str) -> bool:
    r"""Return whether a terminal shows a text as it is; blanks of any width count as printable.

    Example:
        >>> is_printable("a b"), is_printable("a\nb"), is_printable("\x1b[2J")
        (True, False, False)
    """
    return text.isprintable() or all(
        char.isprintable() or unicodedata.category(char) == "Zs" for char in text
    )


def printable_json(value: object) -> str:
    r"""Return a value as indented JSON for a terminal; what does not print is escaped as JSON escapes it.

    Example:
        >>> print(printable_json("Straße \u009b2J"))
        "Straße \u009b2J"
    """
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return "".join(char if char == "\n" or is_printable(char) else json.dumps(char)[1:-1] for char in text)


def _elision(count: int) -> str:
    return f"...({count} characters left out)..."


def shown(value: object, limit: int = 200) -> str:
    """Return the repr of any value for a message: printable, and cut in the middle if it is long.

    Example:
        >>> shown("x" * 100, limit=30)
        "'xxxxxxxxxxxxxxxxxxx...(72 characters left out)...xxxxxxxxx'"
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
