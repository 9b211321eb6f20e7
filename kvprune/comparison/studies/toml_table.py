"""Takes values out of a TOML table, and says which key is wrong, what it holds, and what would be right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from kvprune.errors import StudyError
from kvprune.text import shown, suggestion

__all__ = ["FLAG", "NUMBERS", "TABLES", "TEXT", "TEXTS", "WHOLE", "Kind", "TomlTable"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Kind(Generic[T_co]):
    """A kind of value.

    Attributes:
        right: the kind in words, for messages.
        read: returns a value of this kind as it is, and None for every other one.
    """

    right: str
    read: Callable[[object], T_co | None]


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _table(value: object) -> Mapping[str, object] | None:
    return value if isinstance(value, dict) else None


def _list_of(read: Callable[[object], T | None]) -> Callable[[object], list[T] | None]:
    def read_list(value: object) -> list[T] | None:
        if not isinstance(value, list):
            return None
        found = [one for part in value if (one := read(part)) is not None]
        return found if len(found) == len(value) else None

    return read_list


TEXT = Kind("a non-empty string", _text)
WHOLE = Kind("a whole number", _whole)
FLAG = Kind("true or false", _flag)
TEXTS = Kind("a list of non-empty strings", _list_of(_text))
NUMBERS = Kind("a list of numbers", _list_of(_number))
TABLES = Kind("a list of tables, each under a line [[...]] of its own", _list_of(_table))


class TomlTable:
    """One table of a file.

    Args:
        where: Name of the file and of the table, for messages.
        values: The table.
        known: All keys that it may have.

    Raises:
        StudyError: If it has another key.
    """

    def __init__(self, where: str, values: Mapping[str, object], known: Sequence[str]) -> None:
        self.where, self._values = where, values
        for key in values:
            if key not in known:
                raise StudyError(
                    f"{where}: unknown key {shown(key, 80)}{suggestion(key, known)}; "
                    f"the keys are {', '.join(known)}"
                )

    def get(self, key: str, kind: Kind[T]) -> T | None:
        """Return the value of a key, and None where the table has no such key.

        Raises:
            StudyError: If the value is of another kind.
        """
        if key not in self._values:
            return None
        value = kind.read(self._values[key])
        if value is None:
            raise self.wrong(key, f"it must be {kind.right}")
        return value

    def require(self, key: str, kind: Kind[T]) -> T:
        """Return the value of a key that must be there.

        Raises:
            StudyError: If it is missing, or of another kind.
        """
        value = self.get(key, kind)
        if value is None:
            raise StudyError(f"{self.where}: key {key!r} is missing; it must be {kind.right}")
        return value

    def wrong(self, key: str, right: str) -> StudyError:
        """Return the error about the value of a key; `right` says what it must be."""
        return StudyError(f"{self.where}: key {key!r} is {shown(self._values.get(key))}; {right}")
