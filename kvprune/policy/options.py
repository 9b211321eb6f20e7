"""Types of options: which there are, what they are called, and how spec text is read by them."""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
import typing
from typing import Any, ClassVar, Literal

from kvprune.errors import PolicyOptionError
from kvprune.policy.spec import LARGEST_BITS, OptionValue, PolicySpec, written
from kvprune.text import shown

__all__ = [
    "AnyPolicy",
    "check_option",
    "default_of",
    "describe_type",
    "is_option_type",
    "parse_option",
    "policy_types",
]


class AnyPolicy:
    """Base of all policies, by which the type of an option is recognised as one."""

    name: ClassVar[str]


def describe_type(annotation: Any) -> str:
    """Return an option's type as users read it, such as ``float or none`` or ``values | keys``."""
    if typing.get_origin(annotation) is Literal:
        return " | ".join(str(choice) for choice in typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(describe_type(choice) for choice in typing.get_args(annotation))
    if annotation is type(None):
        return "none"
    if _is_policy_type(annotation):
        return _describe_policy_type(annotation)
    return {bool: "true or false", int: "whole number", float: "number", str: "text"}.get(
        annotation, str(annotation)
    )


def _describe_policy_type(cls: type[AnyPolicy]) -> str:
    if not inspect.isabstract(cls):
        return f"policy {getattr(cls, 'name', cls.__name__)!r}"
    known = {"CrossKVPolicy": "policy", "ScoringPolicy": "policy that ranks tokens"}
    return known.get(cls.__name__, f"policy of class {cls.__name__}")


def is_option_type(annotation: Any) -> bool:
    """Whether an option may have this type.

    That is bool, int, float, str, None, Literal, or a union of these; or a policy class, alone or with None
    and other policy classes (beside text, a name would be one thing or the other).
    """
    policies, choices = policy_types(annotation), _choices(annotation)
    if policies:
        return all(choice in policies or choice is type(None) for choice in choices)
    plain = (bool, int, float, str, type(None))
    return all(choice in plain or typing.get_origin(choice) is Literal for choice in choices)


def policy_types(annotation: Any) -> tuple[type[AnyPolicy], ...]:
    """Return the policy classes among the types that an option may have."""
    return tuple(choice for choice in _choices(annotation) if _is_policy_type(choice))


def _is_policy_type(annotation: Any) -> bool:
    # Foreign metaclasses are not asked.
    return isinstance(annotation, type) and AnyPolicy in type.__getattribute__(annotation, "__mro__")


def default_of(option: dataclasses.Field[Any]) -> Any:
    """Return the default of an option, made where there is a factory; MISSING where it is required."""
    if option.default_factory is not dataclasses.MISSING:
        return option.default_factory()
    return option.default


def check_option(policy: str, option: str, annotation: Any, value: object) -> None:
    """Raise unless a typed value fits the annotation of an option's field, and a spec can say so.

    Raises:
        PolicyOptionError: With the policy, the option, the value and what would be right.
    """
    where = f"option {option!r} of policy {policy!r}"
    if isinstance(value, PolicySpec):
        remedy = "; kvprune.get_policy makes policies of specs" if policy_types(annotation) else ""
        raise PolicyOptionError(
            f"{where} must be {describe_type(annotation)}, got the spec {shown(written(value))}{remedy}"
        )
    if not _fits(annotation, value):
        raise PolicyOptionError(f"{where} must be {describe_type(annotation)}, got {shown(value)}")
    if isinstance(value, str) and not isinstance(again := _read_any(annotation, value), str):
        raise PolicyOptionError(
            f"{where} cannot be the text {shown(value)}, which a spec would read back as {again!r}"
        )
    if isinstance(value, AnyPolicy) and value.name == "none" and type(None) in _choices(annotation):
        raise PolicyOptionError(f"{where} cannot be the policy 'none', which a spec would read back as None")


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
            if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() <= LARGEST_BITS:
                return True
        elif isinstance(value, choice):
            return True
    return False


def _read(choice: Any, text: str) -> OptionValue:
    """Read text as one type; raise ValueError if it is not of that type."""
    if typing.get_origin(choice) is Literal:
        for wanted in typing.get_args(choice):
            if text == written(wanted):
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
