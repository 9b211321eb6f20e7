"""One tree of exceptions: what a user catches with one `except`."""

import inspect

import pytest

import kvprune
from kvprune import errors
from kvprune.text import printable


def test_all_lists_every_exception_and_nothing_else():
    defined = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, Exception)
    }
    assert set(errors.__all__) == defined


@pytest.mark.parametrize("name", errors.__all__)
def test_every_exception_is_a_kvprune_error_with_a_description(name):
    cls = getattr(errors, name)
    assert issubclass(cls, errors.KVPruneError)
    assert cls.__doc__
    assert cls.__doc__.strip()


@pytest.mark.parametrize("name", errors.__all__)
def test_no_exception_is_a_builtin_error_in_disguise(name):
    unwanted = (KeyError, ValueError, TypeError, RuntimeError, AttributeError, LookupError)
    assert not issubclass(getattr(errors, name), unwanted)


@pytest.mark.parametrize(
    ("special", "general"),
    [
        (errors.BudgetError, errors.PolicyOptionError),
        (errors.ScoreError, errors.SelectionError),
        (errors.NameClashError, errors.PluginError),
        (errors.NestedCompressionError, errors.CompressionStateError),
    ],
)
def test_special_cases_are_caught_by_their_general_error(special, general):
    assert issubclass(special, general)


@pytest.mark.parametrize(
    "failing",
    [
        lambda: kvprune.get_policy("No Such Policy"),
        lambda: kvprune.get_policy("no-such-policy"),
        lambda: kvprune.get_policy("trim:no_such_option=1"),
        lambda: kvprune.get_policy("random:keep_ratio=2"),
        lambda: kvprune.Budget(keep_ratio=0),
    ],
)
def test_one_except_clause_catches_what_a_wrong_spec_can_cause(failing):
    with pytest.raises(kvprune.KVPruneError, match=r"[Nn]o.?[Ss]uch|2\.0|got 0"):
        failing()


def test_messages_are_printable_as_text_of_others_is():
    for text in ("plain", "two\nlines", "\x1b[2J\x9b\u202e\t", "a\u00a0b", "\ud800"):
        assert str(errors.DataError(text)) == printable(text, newlines=True)
    assert errors.DataError("\x1b").args == ("\x1b",)
    assert str(errors.DataError()) == ""
