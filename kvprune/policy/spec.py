"""Reads and writes policies as text and JSON: ``name:key=value,key=other(key=value;key=value)``.

Two policies that follow each other are written ``one:key=value then other:key=value``, which stands for
``then(first=one(key=value);second=other(key=value))``.

A spec is data: the name of a policy and its options, some of which may be policies themselves. The registry
(`kvprune.session.registry`) builds policies from specs, and `kvprune.policy.options` knows the types of
options.
"""

from __future__ import annotations

import json
import math
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, TypeGuard, Union

from kvprune.errors import SpecError
from kvprune.text import error_line, shown

__all__ = ["LARGEST_BITS", "OptionValue", "PolicySpec", "written"]

OptionValue = Union[bool, int, float, str, None, "PolicySpec"]

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_RESERVED = re.compile("[,;()]")
_THEN = re.compile(r"(?<!\S)then(?!\S)")
"""The word between two policies that follow each other."""

_LONGEST_NAME = 64
_LARGEST_VERSION = 10**9
_DEEPEST = 4
"""How many policies with options may be nested in each other, the outermost one included."""

LARGEST_BITS = 1024
"""Longest whole number, in bits: no float can hold a longer one."""


@dataclass(frozen=True)
class PolicySpec:
    """A policy's name, its options as written, and optionally the required version of the policy.

    As text, a spec named ``then`` with the options ``first`` and ``second`` is ``FIRST then SECOND``.

    Args:
        name: At most 64 lower-case letters, digits, ``.``, ``_`` and ``-``.
        options: Values by option name: text from a spec string, or typed values from Python and JSON. The
            value of an option that is a policy is a spec. A spec without options and version is stored as its
            name.
        version: If given, the installed policy must have this version.

    Raises:
        SpecError: If the name, an option's name or a value cannot be part of a spec.

    Example:
        >>> spec = PolicySpec.parse("adakv:keep_ratio=0.25,scorer=snapkv(kernel=5)")
        >>> spec.name, dict(spec.options)["keep_ratio"]
        ('adakv', '0.25')
        >>> str(spec)
        'adakv:keep_ratio=0.25,scorer=snapkv(kernel=5)'
    """

    name: str
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    version: int | None = None

    def __post_init__(self) -> None:
        _check_name(self.name)
        _check_version(self.version)
        if not isinstance(self.options, Mapping):
            raise SpecError(f"options of a spec are a mapping of names to values, got {shown(self.options)}")
        for key, value in self.options.items():
            if not isinstance(key, str) or not _KEY.fullmatch(key):
                raise SpecError(f"{shown(key)} is not an option name in the spec of {self.name!r}")
            _check_value(f"option {shown(key)} of {self.name!r}", value)
        # As text, a policy without options is its name. Storing the name makes equal text equal specs.
        options = {key: value.name if _is_bare(value) else value for key, value in self.options.items()}
        object.__setattr__(self, "options", types.MappingProxyType(options))
        if _depth(self) > _DEEPEST:
            raise SpecError(f"policies in a spec are nested at most {_DEEPEST} deep, got {shown(str(self))}")

    def __reduce__(self) -> tuple[type[PolicySpec], tuple[str, dict[str, OptionValue], int | None]]:
        return PolicySpec, (self.name, dict(self.options), self.version)  # a mapping proxy cannot be pickled

    def __hash__(self) -> int:
        return hash((self.name, tuple(sorted(self.options.items(), key=itemgetter(0))), self.version))

    @classmethod
    def parse(cls, text: str) -> PolicySpec:
        """Read ``name``, ``name:key=value,key=value`` or ``name(key=value,key=value)``, or two with ``then``.

        ``;`` works like ``,``. A value may be a spec in the form with parentheses.

        Raises:
            SpecError: If the text does not follow the grammar; the message says where.
        """
        if not isinstance(text, str):
            raise SpecError(f"a spec is text such as 'trim:k_ratio=0.25', got {shown(text)}")
        _require_balance(text)
        if text.strip() != "then" and (words := _outside(_THEN, text)):
            return cls("then", _read_sequence(words, text))
        opening = re.search("[:(]", text)
        if opening is None:
            return cls(text.strip())
        if opening[0] == "(":
            return _read_nested(text.strip(), text)
        return cls(text[: opening.start()].strip(), _read_options(text[opening.end() :], text))

    def __str__(self) -> str:
        if self.name == "then" and list(self.options) == ["first", "second"]:
            sides = self.options.values()
            # A pair in a pair has no such form; it is refused later, with its parts named.
            if all(isinstance(side, str | PolicySpec) and not _THEN.search(str(side)) for side in sides):
                return " then ".join(map(str, sides))
        options = _join(self.options, ",")
        return f"{self.name}:{options}" if options else self.name

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as data for JSON; `from_dict` reads it."""
        options = {
            key: value.to_dict() if isinstance(value, PolicySpec) else value
            for key, value in self.options.items()
        }
        data: dict[str, Any] = {"name": self.name, "options": options}
        if self.version is not None:
            data["version"] = self.version
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PolicySpec:
        """Read what `to_dict` wrote.

        Raises:
            SpecError: If a key is missing or unknown, or a value has the wrong type.
        """
        return cls._from_dict(data, _DEEPEST)

    @classmethod
    def _from_dict(cls, data: Mapping[str, Any], room: int) -> PolicySpec:
        if not isinstance(data, Mapping) or "name" not in data:
            raise SpecError(f"a spec in JSON is an object with a 'name', got {shown(data)}")
        unknown = sorted(set(data) - {"name", "options", "version"}, key=repr)
        if unknown:
            raise SpecError(
                f"unknown keys {shown(unknown)} in spec {shown(dict(data))}; known: name, options, version"
            )
        options = data.get("options", {})
        if isinstance(options, Mapping):
            if room < 0:  # limits the recursion; `__post_init__` would refuse the spec later
                raise SpecError(
                    f"policies in a spec are nested at most {_DEEPEST} deep, got a deeper one in JSON"
                )
            options = {
                key: cls._from_dict(value, room - 1)
                if isinstance(value, Mapping) and "name" in value
                else value
                for key, value in options.items()
            }
        return cls(data["name"], options, data.get("version"))

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
        # ValueError: invalid JSON or UTF-8, or too many digits. RecursionError: nested too deep.
        except (ValueError, TypeError, RecursionError) as error:
            raise SpecError(f"a spec in JSON does not parse ({error_line(error)}): {shown(text)}") from error
        return cls.from_dict(data)


def _check_name(name: object) -> None:
    if not isinstance(name, str) or len(name) > _LONGEST_NAME or not _NAME.fullmatch(name):
        raise SpecError(
            f"{shown(name)} is not a policy name; a name has at most {_LONGEST_NAME} characters: lower-case "
            "letters, digits, '.', '_' and '-'"
        )


def _check_version(version: object) -> None:
    if version is None:
        return
    if isinstance(version, bool) or not isinstance(version, int):
        raise SpecError(f"the version of a spec is a whole number, got {shown(version)}")
    if not 0 <= version <= _LARGEST_VERSION:
        raise SpecError(f"the version of a spec is between 0 and 10**9, got {shown(version)}")


def _check_value(where: str, value: object) -> None:
    """Check that the value of an option can be written in a spec; ``where`` names the option in messages."""
    if not isinstance(value, bool | int | float | str | PolicySpec | None):
        raise SpecError(f"{where} is text, a number, true, false, none or a spec, got {shown(value)}")
    if isinstance(value, str) and (not value or value != value.strip() or _RESERVED.search(value)):
        raise SpecError(
            f"{where} is the text {shown(value)}; text in a spec is not empty, does not begin or end with a "
            "blank, and contains none of ',', ';', '(' and ')'"
        )
    if isinstance(value, str) and value != "then" and _THEN.search(value.lower()):
        raise SpecError(
            f"{where} is the text {shown(value)}; the word 'then' stands between two policies, in lower case"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise SpecError(f"{where} must be a finite number, got {value!r}")
    if isinstance(value, int) and value.bit_length() > LARGEST_BITS:
        raise SpecError(f"{where} must be a number that a float can hold, got {shown(value)}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object from its pairs and refuse duplicate keys; `json` would keep the last one."""
    data = dict(pairs)
    if len(data) < len(pairs):
        raise ValueError("a key is given twice")
    return data


def written(value: OptionValue) -> str:
    """Return an option's value as spec text; a spec is written in the form with parentheses.

    Example:
        >>> written(True), written(None), written(0.5)
        ('true', 'none', '0.5')
    """
    if isinstance(value, PolicySpec):
        # Separated by ";", because some command lines split lists of specs at commas.
        return f"{value.name}({_join(value.options, ';')})" if value.options else value.name
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _join(options: Mapping[str, OptionValue], separator: str) -> str:
    return separator.join(f"{key}={written(value)}" for key, value in options.items())


def _is_bare(value: OptionValue) -> TypeGuard[PolicySpec]:
    return isinstance(value, PolicySpec) and not value.options and value.version is None


def _depth(spec: PolicySpec) -> int:
    inner = [_depth(value) for value in spec.options.values() if isinstance(value, PolicySpec)]
    return 1 + max(inner, default=0) if spec.options else 0


def _require_balance(text: str) -> None:
    """Check that parentheses come in pairs and are not nested too deep, so that the reader may recurse."""
    opened: list[int] = []
    for found in re.finditer("[()]", text):
        if found[0] == "(":
            opened.append(found.start())
            if len(opened) > _DEEPEST:
                raise SpecError(f"policies in a spec are nested at most {_DEEPEST} deep, got {shown(text)}")
        elif not opened:
            raise SpecError(f"')' at position {found.start() + 1} of spec {shown(text)} closes nothing")
        else:
            opened.pop()
    if opened:
        raise SpecError(f"'(' at position {opened[-1] + 1} of spec {shown(text)} is never closed")


def _outside(pattern: re.Pattern[str], text: str) -> list[re.Match[str]]:
    """Return where a pattern occurs outside of parentheses, in text with balanced ones."""
    depths = [0]
    for letter in text:
        depths.append(depths[-1] + {"(": 1, ")": -1}.get(letter, 0))
    return [found for found in pattern.finditer(text) if not depths[found.start()]]


def _read_sequence(words: list[re.Match[str]], text: str) -> dict[str, OptionValue]:
    """Read ``FIRST then SECOND``; ``words`` says where the word stands."""
    if len(words) > 1:
        raise SpecError(f"at most two policies may follow each other, got {len(words) + 1} in {shown(text)}")
    sides = {"first": text[: words[0].start()], "second": text[words[0].end() :]}
    for side in sides.values():
        if not side.strip():
            raise SpecError(f"expected a policy before and after 'then', got {shown(text)}")
    return {name: PolicySpec.parse(side) for name, side in sides.items()}


def _read_nested(part: str, text: str) -> PolicySpec:
    """Read ``name(key=value;key=value)``, a part of a spec's text with balanced parentheses."""
    name, _, rest = part.partition("(")
    depth = 1
    for found in re.finditer("[()]", rest):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            break
    inside, behind = rest[: found.start()], rest[found.end() :].strip()
    if behind:
        raise SpecError(
            f"expected nothing after {shown(part[: -len(behind)])} in spec {shown(text)}, got {shown(behind)}"
        )
    if not inside.strip():
        raise SpecError(
            f"expected key=value between the parentheses of {shown(part)} in spec {shown(text)}; "
            "leave the parentheses out if there are no options"
        )
    return PolicySpec(name.strip(), _read_options(inside, text))


def _read_options(part: str, text: str) -> dict[str, OptionValue]:
    options: dict[str, OptionValue] = {}
    for piece in _pieces(part):
        key, equals, value = (side.strip() for side in piece.partition("="))
        if not equals or not key or not value or "(" in key:
            raise SpecError(f"expected key=value in spec {shown(text)}, got {shown(piece.strip())}")
        if key in options:
            raise SpecError(f"option {shown(key)} is given twice in spec {shown(text)}")
        options[key] = _read_nested(value, text) if "(" in value else value
    return options


def _pieces(part: str) -> Iterator[str]:
    """Split text at the separators outside of parentheses."""
    depth = start = 0
    for found in re.finditer("[(),;]", part):
        if found[0] in "()":
            depth += 1 if found[0] == "(" else -1
        elif not depth:
            yield part[start : found.start()]
            start = found.end()
    yield part[start:]
