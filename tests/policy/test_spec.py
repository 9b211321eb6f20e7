"""Specs as text and JSON: the grammar, round trips, and the typing of options."""

import copy
import dataclasses
import json
import math
import pickle
import re
from typing import Literal, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprune.errors import PolicyOptionError, SpecError
from kvprune.policy.options import check_option, describe_type, parse_option
from kvprune.policy.spec import PolicySpec
from kvprune.text import suggestion

names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,12}", fullmatch=True)
keys = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
# Text that can stand between separators: neither empty nor with blanks at its ends.
plain_text = st.text(min_size=1, max_size=12).filter(
    lambda text: text == text.strip() and not set(text) & set(",;()")
)
any_value = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), plain_text
)
versions = st.none() | st.integers(0, 9)


def nested(values, of_version):
    """Specs with policies in policies, at most four deep."""
    flat = st.builds(PolicySpec, names, st.dictionaries(keys, values, max_size=3), of_version)

    def around(inner):
        options = st.dictionaries(keys, st.one_of(values, inner), max_size=3)
        return st.builds(PolicySpec, names, options, of_version)

    return st.one_of(flat, around(flat), around(around(flat)), around(around(around(flat))))


# text


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("trim", "trim", {}),
        ("trim:k_ratio=0.25", "trim", {"k_ratio": "0.25"}),
        ("trim:k_ratio=0.25,crop_first=false", "trim", {"k_ratio": "0.25", "crop_first": "false"}),
        ("trim:k_ratio=0.25;crop_first=false", "trim", {"k_ratio": "0.25", "crop_first": "false"}),
        ("a:x=1;y=2,z=3", "a", {"x": "1", "y": "2", "z": "3"}),
        ("  trim : k_ratio = 0.25 , crop_first = false ", "trim", {"k_ratio": "0.25", "crop_first": "false"}),
        ("a:path=x=y:z", "a", {"path": "x=y:z"}),
        ("value-spread_2.0", "value-spread_2.0", {}),
        ("2x", "2x", {}),
        ("a(x=1)", "a", {"x": "1"}),
        (" a ( x = 1 ; y = 2 ) ", "a", {"x": "1", "y": "2"}),
        ("a(x=y:z)", "a", {"x": "y:z"}),
        ("a:x=b(y=1;z=2),w=3", "a", {"x": PolicySpec("b", {"y": "1", "z": "2"}), "w": "3"}),
        ("a:x=b(y=1,z=2),w=3", "a", {"x": PolicySpec("b", {"y": "1", "z": "2"}), "w": "3"}),
        (
            "a(x=b ( y = c(z=1) ),w=3)",
            "a",
            {"x": PolicySpec("b", {"y": PolicySpec("c", {"z": "1"})}), "w": "3"},
        ),
        ("a:x=b", "a", {"x": PolicySpec("b")}),
    ],
)
def test_parse_reads_the_grammar(text, name, options):
    spec = PolicySpec.parse(text)
    assert spec == PolicySpec(name, options)
    assert list(spec.options) == list(options)
    assert spec.version is None


@given(names, st.dictionaries(keys, plain_text, max_size=4))
def test_text_round_trip(name, options):
    spec = PolicySpec(name, options)
    assert PolicySpec.parse(str(spec)) == spec


@given(nested(plain_text, st.none()))
def test_text_round_trip_of_policies_in_policies(spec):
    text = str(spec)
    assert PolicySpec.parse(text) == spec
    assert hash(PolicySpec.parse(text)) == hash(spec)
    if spec.options:
        assert PolicySpec.parse(f"{spec.name}({text[len(spec.name) + 1 :]})") == spec
        assert PolicySpec.parse(text.replace(";", ",")) == spec


@given(names, st.dictionaries(keys, plain_text.filter(lambda text: ":" not in text), min_size=1, max_size=4))
def test_semicolons_work_like_commas(name, options):
    spec = PolicySpec(name, options)
    assert PolicySpec.parse(str(spec).replace(",", ";")) == spec


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.25, "0.25"),
        (1e-05, "1e-05"),
        (3, "3"),
        (True, "true"),
        (False, "false"),
        (None, "none"),
        ("x", "x"),
    ],
)
def test_typed_values_are_written_as_users_write_them(value, text):
    assert str(PolicySpec("a", {"key": value})) == f"a:key={text}"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "''"),
        ("   ", "''"),
        (":", "''"),
        (":k=1", "''"),
        ("Trim", "'Trim'"),
        ("tr im", "'tr im'"),
        ("-trim", "'-trim'"),
        ("trim/2", "'trim/2'"),
        ("trím", "'trím'"),
        ("k_ratio=0.25", "'k_ratio=0.25'"),
        ("trim,k_ratio=1", "'trim,k_ratio=1'"),
        ("trim:", "'trim:'.*got ''"),
        ("trim:k_ratio", "'trim:k_ratio'.*got 'k_ratio'"),
        ("trim:k_ratio=", "'trim:k_ratio='.*got 'k_ratio='"),
        ("trim:=0.25", "'trim:=0.25'.*got '=0.25'"),
        ("trim:=", "'trim:='.*got '='"),
        ("trim:a=1,", "'trim:a=1,'.*got ''"),
        ("trim:a=1,,b=2", "'trim:a=1,,b=2'.*got ''"),
        ("trim:a=1;b", "'trim:a=1;b'.*got 'b'"),
        ("trim:a=1,a=2", "'a' is given twice.*'trim:a=1,a=2'"),
        ("trim:1a=1", "'1a'.*'trim'"),
        ("trim:a-b=1", "'a-b'.*'trim'"),
        ("trim:a b=1", "'a b'.*'trim'"),
        ("a(", r"'\(' at position 2 of spec 'a\(' is never closed"),
        ("a:b=c(d=1", r"'\(' at position 6 of spec 'a:b=c\(d=1' is never closed"),
        ("a(b=c(d=1)", r"'\(' at position 2 of spec"),
        ("a)", r"'\)' at position 2 of spec 'a\)' closes nothing"),
        ("a:b=c(d=1))", r"'\)' at position 11 of spec"),
        ("a:b=)c(", r"'\)' at position 5 of spec"),
        (
            "a()",
            r"between the parentheses of 'a\(\)' in spec 'a\(\)'; leave the parentheses out",
        ),
        ("a:b=c( )", r"between the parentheses of 'c\( \)' in spec 'a:b=c\( \)'"),
        ("a(b=1)c", r"nothing after 'a\(b=1\)' in spec 'a\(b=1\)c', got 'c'"),
        ("a(b=1):c=2", r"nothing after 'a\(b=1\)' .*got ':c=2'"),
        ("a(b=1)(c=2)", r"nothing after 'a\(b=1\)' .*got '\(c=2\)'"),
        ("a:b=c(d=1)e,f=2", r"nothing after 'c\(d=1\)' in spec .*, got 'e'"),
        ("a:b=(c=1)", "'' is not a policy name"),
        ("(b=1)", "'' is not a policy name"),
        ("a:b=c:d(e=1)", "'c:d' is not a policy name"),
        ("a:b(c=1)", r"expected key=value in spec 'a:b\(c=1\)', got 'b\(c=1\)'"),
        ("a:b=c(d)", r"expected key=value in spec 'a:b=c\(d\)', got 'd'"),
        ("a:b=c(d=1;d=2)", "'d' is given twice"),
        ("a:b=c(d=1;)", "got ''"),
        ("a:" + "b=c(" * 5 + "d=1" + ")" * 5, "at most 4 deep"),
        ("a:" + "b=c(" * 4 + "d=1" + ")" * 4, "at most 4 deep"),
        (None, "got None"),
        (7, "got 7"),
        (["trim"], r"got \['trim'\]"),
    ],
)
def test_malformed_text_is_refused_and_named(text, named):
    with pytest.raises(SpecError, match=named):
        PolicySpec.parse(text)


@given(st.one_of(st.text(max_size=12), st.text(alphabet="ab1_:=,; ", max_size=14)))
def test_any_text_is_read_or_refused_as_a_spec(text):
    try:
        spec = PolicySpec.parse(text)
    except SpecError as error:
        spec, message = None, str(error)
    if spec is None:
        # What is shown is the text, or the name or key of it that is wrong.
        name, _, rest = text.partition(":")
        parts = re.split("[,;]", rest)
        shown = [text, name, *parts, *(part.partition("=")[0] for part in parts)]
        assert any(repr(part) in message or repr(part.strip()) in message for part in shown)
    else:
        assert PolicySpec.parse(str(spec)) == spec


@pytest.mark.parametrize("value", ["a,b", "a;b", "", " a", "a ", "a(b)", "(", ")", "a(b=1)"])
def test_a_text_that_cannot_be_written_is_refused_or_survives(value):
    try:
        spec = PolicySpec("a", {"key": value})
        text = str(spec)
    except SpecError:
        return
    assert PolicySpec.parse(text) == spec


def test_policies_stand_four_deep_and_a_bare_name_counts_for_none():
    text = "a:b=c(b=c(b=c(b=d)))"
    assert str(PolicySpec.parse(text)) == text
    inner = PolicySpec("d", {}, 3)
    for _ in range(3):
        inner = PolicySpec("c", {"b": inner})
    spec = PolicySpec("a", {"b": inner})
    assert PolicySpec.from_json(spec.to_json()) == spec
    with pytest.raises(SpecError, match="at most 4 deep"):
        PolicySpec("a", {"b": spec})


def test_a_policy_without_options_is_held_as_its_name_unless_it_has_a_version():
    assert PolicySpec("a", {"b": PolicySpec("c")}).options == {"b": "c"}
    assert PolicySpec("a", {"b": PolicySpec("c", {}, 1)}).options == {"b": PolicySpec("c", {}, 1)}
    assert str(PolicySpec("a", {"b": PolicySpec("c", {}, 1)})) == "a:b=c"


def test_inner_options_are_written_without_commas():
    inner = PolicySpec("b", {"x": 0.25, "y": None, "z": PolicySpec("c", {"p": True, "q": 2})})
    assert str(PolicySpec("a", {"k": inner, "l": 1})) == "a:k=b(x=0.25;y=none;z=c(p=true;q=2)),l=1"


# the spec itself


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "A"}, "'A' is not a policy name"),
        ({"name": None}, "None is not a policy name"),
        ({"name": "a\n"}, r"'a\\n' is not a policy name"),
        ({"name": "a", "version": "1"}, "version.*got '1'"),
        ({"name": "a", "version": True}, "version.*got True"),
        ({"name": "a", "version": 1.0}, r"version.*got 1\.0"),
        ({"name": "a", "options": [("b", 1)]}, r"mapping.*got \[\('b', 1\)\]"),
        ({"name": "a", "options": {"b-c": 1}}, "'b-c' is not an option name in the spec of 'a'"),
        ({"name": "a", "options": {1: 1}}, "1 is not an option name in the spec of 'a'"),
        ({"name": "a", "options": {"b": [1]}}, r"option 'b' of 'a'.*got \[1\]"),
        ({"name": "a", "options": {"b": {"c": 1}}}, r"option 'b' of 'a'.*got \{'c': 1\}"),
    ],
)
def test_what_cannot_be_a_spec_is_refused_and_shown(fields, message):
    with pytest.raises(SpecError, match=message):
        PolicySpec(**fields)


def test_a_spec_cannot_be_changed_nor_through_what_it_was_made_from():
    options = {"b": 1}
    spec = PolicySpec("a", options)
    options["b"] = 2
    assert spec.options["b"] == 1
    with pytest.raises(TypeError, match="mappingproxy"):
        spec.options["b"] = 3
    with pytest.raises(dataclasses.FrozenInstanceError, match="name"):
        spec.name = "c"


@pytest.mark.parametrize(
    "other",
    [PolicySpec("b", {"k": 1}), PolicySpec("a", {"k": 2}), PolicySpec("a"), PolicySpec("a", {"k": 1}, 1)],
)
def test_specs_are_equal_if_name_options_and_version_are(other):
    assert PolicySpec("a", {"k": 1}) == PolicySpec("a", {"k": 1})
    assert PolicySpec("a", {"k": 1}) != other


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda spec: pickle.loads(pickle.dumps(spec))])
def test_a_spec_can_be_copied_and_sent_to_another_process(copied):
    spec = PolicySpec("a", {"k": 1}, 2)
    assert copied(spec) == spec


# JSON


@given(names, st.dictionaries(keys, any_value, max_size=4), versions)
def test_json_round_trip_keeps_values_types_and_version(name, options, version):
    spec = PolicySpec(name, options, version)
    again = PolicySpec.from_json(spec.to_json())
    assert again == spec
    assert again.version == version
    assert [(key, type(value)) for key, value in sorted(again.options.items())] == [
        (key, type(value)) for key, value in sorted(spec.options.items())
    ]
    assert PolicySpec.from_dict(spec.to_dict()) == spec
    assert "\n" not in spec.to_json()


@given(nested(any_value, versions))
def test_json_round_trip_of_policies_in_policies(spec):
    assert PolicySpec.from_json(spec.to_json()) == spec
    assert PolicySpec.from_dict(spec.to_dict()) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_json_of_an_inner_policy_is_an_object():
    spec = PolicySpec("a", {"b": PolicySpec("c", {"d": 1}, 2)})
    assert json.loads(spec.to_json())["options"] == {"b": {"name": "c", "options": {"d": 1}, "version": 2}}
    assert PolicySpec.from_dict({"name": "a", "options": {"b": {"name": "c"}}}) == PolicySpec("a", {"b": "c"})


def test_json_of_a_spec_is_plain():
    spec = PolicySpec("trim", {"k_ratio": 0.25, "crop_first": False}, 1)
    assert json.loads(spec.to_json()) == {
        "name": "trim",
        "options": {"k_ratio": 0.25, "crop_first": False},
        "version": 1,
    }
    assert json.loads(PolicySpec("trim").to_json()) == {"name": "trim", "options": {}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, r"'name', got \{\}"),
        ({"options": {}}, "'name', got {'options'"),
        ([], r"'name', got \[\]"),
        ("trim", "'name', got 'trim'"),
        ({"name": "a", "option": {}}, r"unknown keys \['option'\].*known: name, options, version"),
        ({"name": "a", "options": []}, r"mapping.*got \[\]"),
        ({"name": "a", "options": None}, "mapping.*got None"),
        ({"name": "a", "version": "2"}, "version.*got '2'"),
        ({"name": 5}, "5 is not a policy name"),
        ({"name": "a", "options": {"b": [0.5]}}, r"option 'b' of 'a'.*got \[0\.5\]"),
        ({"name": "a", "options": {"b": {"c": 1}}}, r"option 'b' of 'a' is text.*got \{'c': 1\}"),
        ({"name": "a", "options": {"b": {"name": "C"}}}, "'C' is not a policy name"),
        ({"name": "a", "options": {"b": {"name": "c", "x": 1}}}, r"unknown keys \['x'\]"),
        (
            {"name": "a", "options": {"b": "c(d=1)"}},
            r"is the text 'c\(d=1\)'.*contains none of ',', ';', '\('",
        ),
    ],
)
def test_wrong_json_data_is_refused_and_shown(data, message):
    with pytest.raises(SpecError, match=message):
        PolicySpec.from_dict(data)
    with pytest.raises(SpecError, match=message):
        PolicySpec.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "trim:k=1", '{"name": "a",}'])
def test_what_is_no_json_is_refused_and_shown(text):
    with pytest.raises(SpecError, match="does not parse.*" + re.escape(repr(text))):
        PolicySpec.from_json(text)


# typing of options

Side = Literal["high", "low"]


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        (bool, "true", True),
        (bool, "False", False),
        (int, "3", 3),
        (int, "-3", -3),
        (float, "0.25", 0.25),
        (float, "1e-3", 0.001),
        (float, "1", 1.0),
        (str, "anything", "anything"),
        (str, "true", "true"),
        (Side, "low", "low"),
        (Literal[1, 2], "2", 2),
        (Literal[True, "auto"], "true", True),
        (Literal[True, "auto"], "auto", "auto"),
        (float | None, "none", None),
        (float | None, "None", None),
        (float | None, "0.5", 0.5),
        (Optional[int], "7", 7),  # noqa: UP045
        (int | float, "3", 3),
        (int | float, "3.5", 3.5),
        (bool | int, "true", True),
        (bool | int, "4", 4),
        (Side | None, "none", None),
        (Side | None, "high", "high"),
        (float | Side, "low", "low"),
    ],
)
def test_options_are_read_by_the_type_of_their_field(annotation, text, value):
    read = parse_option("p", "o", annotation, text)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("annotation", "text", "right"),
    [
        (bool, "1", "true or false"),
        (bool, "yes", "true or false"),
        (int, "3.0", "whole number"),
        (int, "x", "whole number"),
        (int, "true", "whole number"),
        (int, "none", "whole number"),
        (float, "x", "number"),
        (float, "nan", "number"),
        (float, "inf", "number"),
        (float, "-inf", "number"),
        (float, "1e999", "number"),
        (float, "none", "number"),
        (Side, "High", r"high \| low"),
        (Side, "hi", r"high \| low"),
        (Literal[1, 2], "3", r"1 \| 2"),
        (float | None, "half", "number or none"),
        (Side | None, "x", r"high \| low or none"),
    ],
)
def test_text_of_the_wrong_type_is_refused_and_what_is_right_is_listed(annotation, text, right):
    with pytest.raises(PolicyOptionError, match=f"option 'o' of policy 'p' must be {right}, got {text!r}"):
        parse_option("p", "o", annotation, text)


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (bool, True),
        (int, 3),
        (float, 0.5),
        (float, 1),
        (str, ""),
        (Side, "low"),
        (Literal[1, "x"], 1),
        (float | None, None),
        (Side | None, None),
        (int | str, "x"),
    ],
)
def test_typed_values_that_fit_pass(annotation, value):
    assert check_option("p", "o", annotation, value) is None


@pytest.mark.parametrize(
    ("annotation", "value", "right"),
    [
        (bool, 1, "true or false"),
        (bool, "true", "true or false"),
        (bool, None, "true or false"),
        (int, True, "whole number"),
        (int, 1.0, "whole number"),
        (float, False, "number"),
        (float, math.nan, "number"),
        (float, math.inf, "number"),
        (float, "0.5", "number"),
        (str, 1, "text"),
        (str, None, "text"),
        (Side, "mid", r"high \| low"),
        (Literal[1, 2], True, r"1 \| 2"),
        (Literal[1, 2], 1.0, r"1 \| 2"),
        (float | None, "none", "number or none"),
        (int | None, True, "whole number or none"),
        (Side | None, 0, r"high \| low or none"),
    ],
)
def test_typed_values_that_do_not_fit_are_refused_and_what_is_right_is_listed(annotation, value, right):
    with pytest.raises(PolicyOptionError, match=f"option 'o' of policy 'p' must be {right}, got {value!r}"):
        check_option("p", "o", annotation, value)


@pytest.mark.parametrize("value", [10**400, -(10**400)], ids=["huge", "minus huge"])
def test_a_whole_number_beyond_float_is_refused_as_an_option_error(value):
    with pytest.raises(PolicyOptionError, match=r"must be number, got -?1000"):
        check_option("p", "o", float, value)


@pytest.mark.parametrize("annotation", [str | None, None | str])
def test_none_means_none_wherever_an_option_may_be_none(annotation):
    assert parse_option("p", "o", annotation, "none") is None
    assert parse_option("p", "o", annotation, "x") == "x"


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_survive_being_written_and_read(value):
    written = PolicySpec.parse(str(PolicySpec("p", {"o": value}))).options["o"]
    assert parse_option("p", "o", float, written) == value


@given(st.integers())
def test_whole_numbers_survive_being_written_and_read(value):
    written = PolicySpec.parse(str(PolicySpec("p", {"o": value}))).options["o"]
    assert parse_option("p", "o", int, written) == value


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (bool, "true or false"),
        (int, "whole number"),
        (float, "number"),
        (str, "text"),
        (float | None, "number or none"),
        (Literal["a", "b"], "a | b"),
        (Literal["a", "b"] | None, "a | b or none"),
    ],
)
def test_types_are_described_in_words(annotation, words):
    assert describe_type(annotation) == words


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [("keep_raito", "; did you mean 'keep_ratio'?"), ("k_rati", "; did you mean 'k_ratio'?"), ("zzz", "")],
)
def test_suggestion_names_the_closest_or_nothing(wrong, expected):
    assert suggestion(wrong, iter(["keep_ratio", "k_ratio"])) == expected
    assert suggestion(wrong, []) == ""
