"""Only JSON that can be written back and walked is taken; everything else is one kind of error."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprune.comparison.data.safe_json import parse

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    # Half a surrogate pair is not a string.
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text("ab\u00e4", max_size=3), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(value=VALUES)
def test_what_json_writes_is_read(value: Any) -> None:
    assert parse(json.dumps(value)) == value
    assert parse(json.dumps(value, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "Expecting value"),
        (b"\xff", "utf-8"),
        (b"[" * 100_000, "nested more than 50 levels"),
        (b'{"a":' * 100_000, "nested more than 50 levels"),
        (b"[" * 51 + b"]" * 51, "nested more than 50 levels"),
        (b"NaN", "NaN is not a JSON number"),
        (b'{"a": [-Infinity]}', "-Infinity is not a JSON number"),
        (b"[1e999]", "too large for a float"),
        (b'{"a": 1, "b": 2, "a": 1}', "key 'a' appears twice"),
        (b'"\\ud800"', "surrogates not allowed"),
        (b'{"\\udfff": 1}', "surrogates not allowed"),
        (b"9" * 5000, "integer string conversion"),
        (b"{} {}", "Extra data"),
    ],
)
def test_the_rest_is_a_value_error(text: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


@given(raw=st.binary(max_size=30))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    with suppress(ValueError):
        json.dumps(parse(raw), allow_nan=False)
