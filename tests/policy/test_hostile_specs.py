"""Specs from anybody: whatever the text, a spec comes out of it or a short, printable, typed error."""

import json
import string
import sys
from typing import Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from kvprune_strategies import kvprune_policies
from test_spec import any_value, keys, names, nested, plain_text, versions

import kvprune
from kvprune import PolicySpec
from kvprune.errors import KVPruneError, PolicyOptionError, SpecError
from kvprune.policy.options import check_option, parse_option
from kvprune.text import error_line, printable, shown, suggestion

MEGABYTE = 10**6
POLICIES = sorted(policy.name for policy in kvprune_policies())

# Separators, numbers that a parser may stumble over, and what does not print, in all places.
WORDS = [
    "trim",
    "random",
    ":",
    "=",
    ",",
    ";",
    "(",
    ")",
    "keep_ratio",
    "k_ratio",
    "reach",
    "true",
    "none",
    "onward",
]
NUMBERS = ["0.5", "1", "-1", "nan", "-inf", "1e999", "1e-999", "0x10", "1_0", "\u0663", "\u00bd", "\uff11"]
NUMBERS += ["9" * 5000, "0." + "9" * 5000]
ODD = [
    " ",
    "\x00",
    "\n",
    "\t",
    "\x1b[2J",
    "\ud800",
    "\u202e",
    "\u2028",
    "\u00e9",
    "\u0435",
    "{}",
    "%s",
    "'",
    '"',
]
pieces = st.sampled_from([*WORDS, *NUMBERS, *ODD, "\\", "a" * 70])
hostile = st.one_of(
    st.lists(pieces, max_size=12).map("".join),
    st.text(st.characters(), max_size=40),
    st.builds("{}:{}={}".format, st.sampled_from(POLICIES), pieces, pieces),
    st.builds("{}:keep_ratio={}".format, st.sampled_from(POLICIES), st.text(max_size=20)),
    st.builds("{}:keep_ratio={}({}={})".format, st.sampled_from(POLICIES), pieces, pieces, pieces),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def outcome(build, *arguments):
    """Return what came out; only our errors may, and their messages are short and printable."""
    try:
        return build(*arguments)
    except KVPruneError as error:
        refused = error
    assert len(str(refused)) < 2000
    assert str(refused).isprintable(), str(refused)
    return refused


@given(hostile)
@example("trim:k_ratio=" + "9" * 5000)
@example("random:keep_tokens=" + "9" * 5000)
@example("random:keep_tokens=" + "9" * 300)
@example("random:keep_ratio=1e-320")
@example("random:keep_tokens=٣")
@example("a" * MEGABYTE)
@example("trim:" + "a" * MEGABYTE)
@example("trim:" + "a" * MEGABYTE + "=1")
@example("trim:k_ratio=" + "a" * MEGABYTE)
@example("trim:" + "k_ratio=1," * 50_000)
@example("\x00" * MEGABYTE)
@example("(" * MEGABYTE)
@example(")" * MEGABYTE)
@example("a(b=" * 100_000)
@example("a(b=" * 1000 + "c" + ")" * 1000)
@example("a:" + "b(c=1)" * 100_000)
@example("a:" + "b=c(d=1)," * 50_000)
@example("trim:k_ratio=" + "a" * MEGABYTE + "(b=1)")
@example("trim:k_ratio=a(b=" + "c" * MEGABYTE + ")")
@example("trim:k_ratio=trim(k_ratio=0.5)")
def test_any_text_becomes_a_spec_and_a_policy_or_a_typed_error(text):
    spec = outcome(PolicySpec.parse, text)
    policy = outcome(kvprune.get_policy, text)
    if isinstance(spec, PolicySpec):
        assert PolicySpec.parse(str(spec)) == spec
        assert PolicySpec.from_json(spec.to_json()) == spec
    else:
        assert isinstance(spec, SpecError)
        assert isinstance(policy, SpecError)
    if isinstance(policy, kvprune.CrossKVPolicy):
        assert kvprune.get_policy(str(policy.spec)) == policy
        assert kvprune.get_policy(PolicySpec.from_json(policy.spec.to_json())) == policy


@given(
    st.one_of(st.text(st.characters(), max_size=40), st.text(alphabet='{}[]":,name0e+-. \\u', max_size=30))
)
@example("[" * 100_000)
@example('{"name":' * 100_000)
@example('{"name": "a", "version": ' + "9" * 5000 + "}")
@example('{"name": "a", "version": ' + "9" * 4000 + "}")
@example('{"name": "a", "options": {"b": ' + "9" * 5000 + "}}")
@example('{"name": "a", "options": {"b": 1e999}}')
@example('{"name": "a", "options": {"b": NaN}}')
@example('{"name": "a", "name": "b"}')
@example('{"name": "\\ud800"}')
@example("\ufeff{}")
@example('"' + "a" * MEGABYTE + '"')
def test_any_text_is_json_of_a_spec_or_a_typed_error(text):
    spec = outcome(PolicySpec.from_json, text)
    assert isinstance(spec, PolicySpec | SpecError)
    if isinstance(spec, PolicySpec):
        assert PolicySpec.from_json(spec.to_json()) == spec


@given(
    json_values
    | st.fixed_dictionaries(
        {"name": names | json_values},
        optional={
            "options": st.dictionaries(keys | st.text(max_size=5), json_values),
            "version": json_values,
        },
    )
)
def test_any_json_data_is_a_spec_or_a_typed_error(data):
    spec = outcome(PolicySpec.from_dict, data)
    assert isinstance(spec, PolicySpec | SpecError)
    assert isinstance(outcome(PolicySpec.from_json, json.dumps(data)), type(spec))
    if isinstance(spec, PolicySpec):
        assert isinstance(outcome(kvprune.get_policy, spec), kvprune.CrossKVPolicy | KVPruneError)


@pytest.mark.parametrize("data", [b"\xff\xfe", b'{"name": "\xff"}', None, 3, bytearray(b"{")], ids=repr)
def test_bytes_and_what_is_no_text_are_refused(data):
    assert isinstance(outcome(PolicySpec.from_json, data), SpecError)


def test_deeply_nested_data_is_refused():
    lists = []
    for _ in range(100_000):
        lists = [lists]
    for data in (
        lists,
        {"name": lists},
        {"name": "a", "options": {"b": lists}},
        {"name": "a", "x": lists},
    ):
        assert isinstance(outcome(PolicySpec.from_dict, data), SpecError)


def test_policies_nested_without_end_are_refused():
    deep = {"name": "a"}
    for _ in range(100_000):
        deep = {"name": "a", "options": {"b": deep}}
    assert isinstance(outcome(PolicySpec.from_dict, deep), SpecError)
    loop = {"name": "a", "options": {}}
    loop["options"]["b"] = loop
    assert isinstance(outcome(PolicySpec.from_dict, loop), SpecError)


@given(nested(any_value, versions))
def test_every_nested_spec_reads_back_what_it_writes(spec):
    assert str(PolicySpec.parse(str(spec))) == str(spec)
    assert isinstance(outcome(kvprune.get_policy, spec), kvprune.CrossKVPolicy | KVPruneError)


def test_keys_of_several_types_are_refused():
    with pytest.raises(SpecError, match="unknown keys"):
        PolicySpec.from_dict({"name": "a", 1: 2, "b": 3, None: 4})


def test_a_key_that_stands_twice_in_json_is_refused():
    with pytest.raises(SpecError, match="a key is given twice"):
        PolicySpec.from_json('{"name": "a", "options": {"b": 1, "b": 2}}')


@given(names, st.dictionaries(keys, any_value, max_size=4), versions)
def test_every_spec_reads_back_what_it_writes(name, options, version):
    spec = PolicySpec(name, options, version)
    again = PolicySpec.parse(str(spec))
    assert str(again) == str(spec)
    assert again.name == name
    assert list(again.options) == list(options)
    assert PolicySpec.from_json(spec.to_json()) == spec


@given(names, st.dictionaries(keys, plain_text, max_size=4))
def test_every_spec_of_texts_is_equal_to_what_it_writes(name, options):
    spec = PolicySpec(name, options)
    assert PolicySpec.parse(str(spec)) == spec
    assert hash(PolicySpec.parse(str(spec))) == hash(spec)


@pytest.mark.parametrize("value", [2**1025, -(2**1025), 10**5000], ids=["one bit", "minus", "digits"])
def test_whole_numbers_that_cannot_be_written_are_refused(value):
    for error in (
        outcome(PolicySpec, "a", {"b": value}),
        outcome(PolicySpec, "a", {}, value),
        outcome(check_option, "p", "o", int, value),
        outcome(check_option, "p", "o", float, value),
    ):
        assert isinstance(error, KVPruneError)


@pytest.mark.parametrize(
    "text", ["9" * 400, "9" * 5000, "٣", "1_000", "0x10", "1e3", "", " ", "3\x00", "+-3"]
)
def test_digits_that_are_no_number_here_are_refused(text):
    with pytest.raises(PolicyOptionError, match="must be whole number"):
        parse_option("p", "o", int, text)


@pytest.mark.parametrize(
    ("annotation", "value", "again"),
    [
        (str | None, "none", "None"),
        (str | None, "NONE", "None"),
        (bool | str, "true", "True"),
        (int | str, "7", "7"),
    ],
)
def test_a_text_that_a_spec_would_read_as_something_else_is_refused(annotation, value, again):
    with pytest.raises(PolicyOptionError, match=f"cannot be the text '{value}': .* is read as {again}"):
        check_option("p", "o", annotation, value)
    check_option("p", "o", annotation, "plain")
    check_option("p", "o", Literal["none", "true"], "none")


def test_a_name_has_at_most_64_characters():
    assert PolicySpec("a" * 64).name == "a" * 64
    with pytest.raises(SpecError, match="at most 64"):
        PolicySpec("a" * 65)


def test_nothing_is_suggested_for_what_is_far_too_long_or_no_text():
    assert suggestion("a" * MEGABYTE, ["a" * 60]) == ""
    assert suggestion(7, ["a"]) == ""


# text


@given(st.text(st.characters(), max_size=30))
def test_printable_text_can_be_printed_and_loses_nothing_that_could_be(text):
    made = printable(text)
    assert all(char.isprintable() or char in "\u00a0\u2003" or char.isspace() for char in made)
    assert not set(made) & set("\x1b\n\r\t\u2028\u202e\u200b\ud800")
    if text.isprintable():
        assert made == text
    made.encode()


def test_printable_text_keeps_newlines_where_asked():
    assert printable("a\nb\x1b", newlines=True) == "a\nb\\x1b"
    assert printable("a\nb") == "a\\nb"


@pytest.mark.parametrize("limit", [1, 2, 3, 10, 200])
def test_long_text_is_cut_in_the_middle(limit):
    text = string.ascii_lowercase * 1000
    made = printable(text, limit)
    assert len(made) < limit + 40
    assert made.startswith("a" if limit > 1 else "...")
    assert "characters left out" in made
    assert printable("a" * limit, limit) == "a" * limit


class Mute:
    def __repr__(self):
        raise SystemExit("no")


class InterruptingError(Exception):
    def __repr__(self):
        raise KeyboardInterrupt

    __str__ = __repr__


def test_what_cannot_be_shown_is_named():
    assert shown(Mute()) == "<Mute that cannot be shown: SystemExit>"
    if sys.get_int_max_str_digits():
        assert shown(10**5000) == "<int of 16610 bits that cannot be shown: ValueError>"
    assert shown("\x1b") == r"'\x1b'"


def test_ctrl_c_is_never_swallowed():
    with pytest.raises(KeyboardInterrupt):
        shown(InterruptingError())
    with pytest.raises(KeyboardInterrupt):
        error_line(InterruptingError())


def test_an_error_without_words_is_its_type():
    assert error_line(ValueError()) == "ValueError"
    assert error_line(ValueError("a\n  b\x1b")) == r"ValueError: a b\x1b"
