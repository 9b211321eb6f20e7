"""Text of others, made fit for messages and terminals: short, printable, and never an error itself.

Specs, docstrings, names and exceptions may come from anybody and hold anything: a megabyte, terminal
escape sequences, a ``__repr__`` that raises.
"""

from __future__ import annotations

import unicodedata

__all__ = ["error_line", "printable", "shown"]


def printable(text: str, limit: int | None = None, *, newlines: bool = False) -> str:
    """Escape what does not print: control characters, text-direction marks, lone surrogates.

    Args:
        text: Anything.
        limit: Longest text that is shown in full; of a longer one the middle is left out.
        newlines: Whether newlines stay as they are.
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
    head, tail = limit * 2 // 3, len(text) - limit // 3
    return f"{text[:head]}...({tail - head} characters left out)...{text[tail:]}"


def shown(value: object, limit: int = 200) -> str:
    """Return the repr of a value for a message: printable, cut in the middle, whatever the value is."""
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
    """Return an exception as one printable line, ``Type: message``, even if its ``__str__`` raises."""
    try:
        text = " ".join(str(error).split())
    except KeyboardInterrupt:
        raise
    except BaseException as second:
        text = f"its message cannot be shown: {type(second).__name__}"
    name = type(error).__name__
    return printable(f"{name}: {text}" if text else name, limit)
