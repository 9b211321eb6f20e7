"""Text for messages: the docstring that an author wrote, and what suggestions are made for."""

import dataclasses

import pytest

from kvprune.policy.options import required_options
from kvprune.text import docstring, printable, suggestion


class Documented:
    """One line.

    Args:
        size: A number.
    """


@dataclasses.dataclass
class Undocumented:
    size: int
    step: int = 1
    names: list = dataclasses.field(default_factory=list)


class Inheriting(Documented):
    pass


class Odd:
    __doc__ = 7


class Norm:
    """Norm(values) ranks the tokens."""


def test_the_docstring_of_a_class_is_its_authors_own():
    assert docstring(Documented) == "One line.\n\nArgs:\n    size: A number."
    assert Undocumented.__doc__ == "Undocumented(size: int, step: int = 1, names: list = <factory>)"
    for cls in (Undocumented, Inheriting, Odd):
        assert docstring(cls) == ""


def test_a_docstring_that_begins_with_the_name_of_its_class_is_its_authors_own():
    assert docstring(Norm) == "Norm(values) ranks the tokens."


@pytest.mark.parametrize("limit", [0, 1, 10, 57, 58, 59, 60, 61, 400])
def test_what_is_cut_is_never_longer_than_it_was(limit):
    for length in (limit, limit + 1, limit + 9, limit + 12, limit + 1000, 10**6):
        text = printable("x" * length, limit)
        assert len(text) <= min(length, limit if limit > 70 else limit + 40)
        assert text == "x" * length or f"...({length - text.count('x')} characters left out)..." in text


def test_required_options_have_neither_default_nor_factory():
    assert required_options(Undocumented) == ["size"]
    assert required_options(Documented) == []


@pytest.mark.parametrize(
    ("wrong", "right"), [("reda", "read"), ("a" * 65, "a" * 64), (None, "none"), ("", "x")]
)
def test_suggestions_are_close_names_of_ordinary_length(wrong, right):
    expected = "; did you mean 'read'?" if wrong == "reda" else ""
    assert suggestion(wrong, [right]) == expected
