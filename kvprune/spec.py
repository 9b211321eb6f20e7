"""Policies as text and JSON: the grammar ``name:key=value,key=value`` and the typing of its values.

A spec is data: it names a policy and its options. Turning it into a policy is the registry's business.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kvprune.errors import PolicyOptionError, SpecError
from kvprune.text import error_line, shown

__all__ = [
    "OptionValue",
    "PolicySpec",
    "check_option",
    "describe_type",
    "is_option_type",
    "parse_option",
    "suggestion",
]

OptionValue = bool | int | float | str | None

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LONGEST_NAME = 64
_LARGEST_VERSION = 10**9
_MOST_BITS = 1024
"""Of a whole number: what no float holds is no option, and Python itself refuses to write far longer ones."""


@dataclass(frozen=True)
class PolicySpec:
    """A policy's name, its options as written, and the version of the policy if one is demanded.

    Args:
        name: Lower-case letters, digits, ``.``, ``_`` and ``-``; at most 64.
        options: Values by option name: text from a spec string, or typed values from Python and JSON.
        version: If given, the installed policy must have this version.

    Raises:
        SpecError: If the name, an option's name or a value cannot be part of a spec.
    """

    name: str
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    version: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or len(self.name) > _LONGEST_NAME or not _NAME.fullmatch(self.name):
            raise SpecError(
                f"{shown(self.name)} is no policy name; names are lower-case letters, digits and "
                f"'.', '_', '-', at most {_LONGEST_NAME}"
            )
        version = self.version
        if version is not None and (isinstance(version, bool) or not isinstance(version, int)):
            raise SpecError(f"the version of a spec is a whole number, got {shown(version)}")
        if version is not None and not 0 <= version <= _LARGEST_VERSION:
            raise SpecError(f"the version of a spec is between 0 and 10**9, got {shown(version)}")
        if not isinstance(self.options, Mapping):
            raise SpecError(f"options of a spec are a mapping of names to values, got {shown(self.options)}")
        for key, value in self.options.items():
            if not isinstance(key, str) or not _KEY.fullmatch(key):
                raise SpecError(f"{shown(key)} is no option name in the spec of {self.name!r}")
            where = f"option {shown(key)} of {self.name!r}"
            if not isinstance(value, bool | int | float | str | None):
                raise SpecError(f"{where} is text, a number, true, false or none, got {shown(value)}")
            if isinstance(value, str) and (not value or value != value.strip() or re.search("[,;]", value)):
                raise SpecError(
                    f"{where} holds the text {shown(value)}; text in a spec is not empty, "
                    "has no blanks at its ends, and neither ',' nor ';'"
                )
            if isinstance(value, float) and not math.isfinite(value):
                raise SpecError(f"{where} must be a finite number, got {value!r}")
            if isinstance(value, int) and value.bit_length() > _MOST_BITS:
                raise SpecError(f"{where} must be a number that a float can hold, got {shown(value)}")
        object.__setattr__(self, "options", types.MappingProxyType(dict(self.options)))

    def __reduce__(self) -> tuple[type[PolicySpec], tuple[str, dict[str, OptionValue], int | None]]:
        return PolicySpec, (self.name, dict(self.options), self.version)  # a read-only view cannot be pickled

    def __hash__(self) -> int:
        return hash((self.name, tuple(sorted(self.options.items(), key=str)), self.version))

    @classmethod
    def parse(cls, text: str) -> PolicySpec:
        """Read ``name`` or ``name:key=value,key=value``; ``;`` works like ``,``.

        Raises:
            SpecError: If the text does not follow the grammar; the message says where.
        """
        if not isinstance(text, str):
            raise SpecError(f"a spec is text such as 'trim:k_ratio=0.25', got {shown(text)}")
        name, colon, rest = text.strip().partition(":")
        options: dict[str, OptionValue] = {}
        if colon:
            for part in re.split("[,;]", rest):
                key, equals, value = (piece.strip() for piece in part.partition("="))
                if not equals or not key or not value:
                    raise SpecError(f"expected key=value in spec {shown(text)}, got {shown(part.strip())}")
                if key in options:
                    raise SpecError(f"option {shown(key)} is given twice in spec {shown(text)}")
                options[key] = value
        return cls(name.strip(), options)

    def __str__(self) -> str:
        written = ",".join(f"{key}={_written(value)}" for key, value in self.options.items())
        return f"{self.name}:{written}" if written else self.name

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as JSON-ready data; `from_dict` reads it back."""
        data: dict[str, Any] = {"name": self.name, "options": dict(self.options)}
        if self.version is not None:
            data["version"] = self.version
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PolicySpec:
        """Read what `to_dict` wrote.

        Raises:
            SpecError: If a key is missing or unknown, or a value has the wrong type.
        """
        if not isinstance(data, Mapping) or "name" not in data:
            raise SpecError(f"a spec in JSON is an object with a 'name', got {shown(data)}")
        unknown = sorted(set(data) - {"name", "options", "version"}, key=repr)
        if unknown:
            raise SpecError(
                f"unknown keys {shown(unknown)} in spec {shown(dict(data))}; known: name, options, version"
            )
        return cls(data["name"], data.get("options", {}), data.get("version"))

    def to_json(self) -> str:
        """Return `to_dict` as one line of JSON."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> PolicySpec:
        """Read what `to_json` wrote.

        Raises:
            SpecError: If the text is not JSON or not a spec, or an object in it has a key twice.
        """
        try:
            data = json.loads(text, object_pairs_hook=_unique)
        # ValueError: no JSON, no UTF-8, or more digits than Python reads; RecursionError: nested too deep.
        except (ValueError, TypeError, RecursionError) as error:
            raise SpecError(f"a spec in JSON does not parse ({error_line(error)}): {shown(text)}") from error
        return cls.from_dict(data)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object of its pairs; JSON itself would let the last of two equal keys win."""
    data = dict(pairs)
    if len(data) < len(pairs):
        raise ValueError("a key is given twice")
    return data


def _written(value: OptionValue) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)


def suggestion(wrong: str, right: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest of the right names, or nothing."""
    if not isinstance(wrong, str) or len(wrong) > _LONGEST_NAME:  # nothing is close, and looking takes long
        return ""
    close = difflib.get_close_matches(wrong, list(right), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def describe_type(annotation: Any) -> str:
    """Return an option's type as users read it, such as ``float or none`` or ``values | keys``."""
    if typing.get_origin(annotation) is Literal:
        return " | ".join(str(choice) for choice in typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(describe_type(choice) for choice in typing.get_args(annotation))
    if annotation is type(None):
        return "none"
    return {bool: "true or false", int: "whole number", float: "number", str: "text"}.get(
        annotation, str(annotation)
    )


def is_option_type(annotation: Any) -> bool:
    """Whether an option may have this type: bool, int, float, str, None, Literal, or a union of these."""
    plain = (bool, int, float, str, type(None))
    return all(choice in plain or typing.get_origin(choice) is Literal for choice in _choices(annotation))


def check_option(policy: str, option: str, annotation: Any, value: object) -> None:
    """Raise unless a typed value fits the annotation of an option's field, and a spec can say so.

    Raises:
        PolicyOptionError: With the policy, the option, the value and what would be right.
    """
    where = f"option {option!r} of policy {policy!r}"
    if not _fits(annotation, value):
        raise PolicyOptionError(f"{where} must be {describe_type(annotation)}, got {shown(value)}")
    if isinstance(value, str) and not isinstance(again := _read_any(annotation, value), str):
        raise PolicyOptionError(
            f"{where} cannot be the text {shown(value)}, which a spec would read back as {again!r}"
        )


def parse_option(policy: str, option: str, annotation: Any, text: str) -> OptionValue:
    """Read an option's value from spec text by the annotation of its field.

    Raises:
        PolicyOptionError: If no type of the annotation can be read from the text.
    """
    try:
        return _read_any(annotation, text)
    except ValueError:
        raise PolicyOptionError(
            f"option {option!r} of policy {policy!r} must be {describe_type(annotation)}, got {shown(text)}"
        ) from None


def _read_any(annotation: Any, text: str) -> OptionValue:
    """Read text as the first type of the annotation that fits; raise ValueError if none does."""
    # "none" means none wherever that is allowed, also beside text.
    for choice in sorted(_choices(annotation), key=lambda choice: choice is not type(None)):
        try:
            value = _read(choice, text)
        except ValueError:  # also what Python raises for more digits than it reads
            continue
        if _fits(choice, value):
            return value
    raise ValueError(text)


def _choices(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _fits(annotation: Any, value: object) -> bool:
    for choice in _choices(annotation):
        if typing.get_origin(choice) is Literal:
            if any(value == wanted and type(value) is type(wanted) for wanted in typing.get_args(choice)):
                return True
        elif choice is float:
            if isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value):
                return True
        elif choice is int:
            if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() <= _MOST_BITS:
                return True
        elif isinstance(value, choice):
            return True
    return False


def _read(choice: Any, text: str) -> OptionValue:
    """Read text as one type; raise ValueError if it is not of that type."""
    if typing.get_origin(choice) is Literal:
        for wanted in typing.get_args(choice):
            if text == _written(wanted):
                return typing.cast(OptionValue, wanted)
        raise ValueError(text)
    if choice is bool:
        return (
            {"true": True, "false": False}[text.lower()] if text.lower() in ("true", "false") else _fail(text)
        )
    if choice is type(None):
        return None if text.lower() == "none" else _fail(text)
    if choice in (int, float):
        if "_" in text or not text.isascii():  # Python would read 1_0 as ten
            raise ValueError(text)
        return int(text) if choice is int else float(text)
    return text


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def _fail(text: str) -> OptionValue:
    raise ValueError(text)
