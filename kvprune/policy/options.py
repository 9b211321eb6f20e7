"""Types of policy options: which types are allowed, how they are described, and how text is read as one.

The options of a policy are its dataclass fields, and their type annotations say which values they take.
"""

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
    "required_options",
]


class AnyPolicy:
    """Base of all policies, so that this file can recognise policy classes without importing them."""

    name: ClassVar[str]


def describe_type(annotation: Any) -> str:
    """Return a description of an option's type for users.

    Example:
        >>> describe_type(float | None)
        'number or none'
        >>> describe_type(Literal["values", "keys"])
        'values | keys'
    """
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
    known = {
        "CrossKVPolicy": "policy",
        "ScoringPolicy": "policy that ranks tokens",
        "FeaturePolicy": "policy that decides before the first cross-attention layer",
    }
    return known.get(cls.__name__, f"policy of class {cls.__name__}")


def is_option_type(annotation: Any) -> bool:
    """Whether an option may have this type.

    Allowed are bool, int, float, str, None, Literal and unions of these; and policy classes, alone or in a
    union with None and other policy classes. A union of str and a policy would be ambiguous: a name could be
    either.
    """
    policies, choices = policy_types(annotation), _choices(annotation)
    if policies:
        return all(choice in policies or choice is type(None) for choice in choices)
    plain = (bool, int, float, str, type(None))
    return all(choice in plain or typing.get_origin(choice) is Literal for choice in choices)


def policy_types(annotation: Any) -> tuple[type[AnyPolicy], ...]:
    """Return the policy classes in an option's annotation; none if the option is not a policy."""
    return tuple(choice for choice in _choices(annotation) if _is_policy_type(choice))


def _is_policy_type(annotation: Any) -> bool:
    # Read without calling a foreign metaclass, which could run code of its own.
    return isinstance(annotation, type) and AnyPolicy in type.__getattribute__(annotation, "__mro__")


def default_of(option: dataclasses.Field[Any]) -> Any:
    """Return the default of an option, calling its factory if it has one; MISSING if it is required."""
    if option.default_factory is not dataclasses.MISSING:
        return option.default_factory()
    return option.default


def required_options(cls: type) -> list[str]:
    """Return the names of the options without a default, in order; [] if the class is not a dataclass.

    Example:
        >>> @dataclasses.dataclass
        ... class Window:
        ...     size: int
        ...     step: int = 1
        >>> required_options(Window)
        ['size']
    """
    return [
        option.name
        for option in (dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ())
        if option.default is dataclasses.MISSING and option.default_factory is dataclasses.MISSING
    ]


def check_option(policy: str, option: str, annotation: Any, value: object, *, of: str = "policy") -> None:
    """Check that a typed value fits the annotation of an option, and that a spec can express it.

    Args:
        policy: Name of the policy, for the message.
        option: Name of the option.
        annotation: Type annotation of the option's field.
        value: The value.
        of: What has the option, for the message.

    Raises:
        PolicyOptionError: If it does not fit; shows the value and what would be right.
    """
    where = f"option {option!r} of {of} {policy!r}"
    if isinstance(value, PolicySpec):
        remedy = "; kvprune.get_policy builds a policy from a spec" if policy_types(annotation) else ""
        raise PolicyOptionError(
            f"{where} must be {describe_type(annotation)}, got the spec {shown(written(value))}{remedy}"
        )
    if not _fits(annotation, value):
        raise PolicyOptionError(f"{where} must be {describe_type(annotation)}, got {shown(value)}")
    if isinstance(value, str) and not isinstance(again := _read_any(annotation, value), str):
        raise PolicyOptionError(
            f"{where} cannot be the text {shown(value)}: a spec with this text is read as {again!r}"
        )
    if isinstance(value, AnyPolicy) and value.name == "none" and type(None) in _choices(annotation):
        raise PolicyOptionError(f"{where} cannot be the policy 'none': a spec with this text is read as None")


def parse_option(policy: str, option: str, annotation: Any, text: str, *, of: str = "policy") -> OptionValue:
    """Read an option's value from spec text, according to the annotation of its field.

    Args:
        policy: Name of the policy, for the message.
        option: Name of the option.
        annotation: Type annotation of the option's field.
        text: The value in the spec.
        of: What has the option, for the message.

    Raises:
        PolicyOptionError: If the text is not a value of the annotated type.

    Example:
        >>> parse_option("snapkv", "window", int | None, "16")
        16
        >>> parse_option("snapkv", "window", int | None, "none") is None
        True
    """
    try:
        return _read_any(annotation, text)
    except ValueError:
        raise PolicyOptionError(
            f"option {option!r} of {of} {policy!r} must be {describe_type(annotation)}, got {shown(text)}"
        ) from None


def _read_any(annotation: Any, text: str) -> OptionValue:
    """Read text as the first type of the annotation that fits; raise ValueError if none does."""
    # "none" is read as None wherever None is allowed, also in a union with str.
    for choice in sorted(_choices(annotation), key=lambda choice: choice is not type(None)):
        try:
            value = _read(choice, text)
        except ValueError:  # Python also raises it for numbers with too many digits
            continue
        if _fits(choice, value):
            return value
    raise ValueError(text)


def _choices(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _fits(annotation: Any, value: object) -> bool:
    return any(_fits_one(choice, value) for choice in _choices(annotation))


def _fits_one(choice: Any, value: object) -> bool:
    """Whether a value is of one type of a union; True and False are not numbers."""
    if typing.get_origin(choice) is Literal:
        return any(value == wanted and type(value) is type(wanted) for wanted in typing.get_args(choice))
    if choice is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
    if choice is int:
        return isinstance(value, int) and not isinstance(value, bool) and value.bit_length() <= LARGEST_BITS
    return isinstance(value, choice)


def _read(choice: Any, text: str) -> OptionValue:
    """Read text as one type; raise ValueError if it is not of that type."""
    if typing.get_origin(choice) is Literal:
        for wanted in typing.get_args(choice):
            if text == written(wanted):
                return typing.cast(OptionValue, wanted)
        raise ValueError(text)
    if choice is bool or choice is type(None):
        values: dict[str, bool | None] = {"true": True, "false": False} if choice is bool else {"none": None}
        if text.lower() not in values:
            raise ValueError(text)
        return values[text.lower()]
    if choice in (int, float):
        if "_" in text or not text.isascii():  # Python reads 1_0 as ten
            raise ValueError(text)
        return int(text) if choice is int else float(text)
    return text


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False
