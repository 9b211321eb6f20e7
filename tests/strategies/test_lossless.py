"""`lossless` selects nothing: what decoding cannot see is evicted without it."""

import pytest
from helpers import conversations, make_view
from hypothesis import given
from kvprune_strategies import Lossless

import kvprune
from kvprune import Decision
from kvprune.errors import PolicyOptionError


def test_lossless_is_found_by_its_name_and_has_no_options():
    assert kvprune.get_policy("lossless") == Lossless()
    assert Lossless.option_types() == {}
    with pytest.raises(PolicyOptionError, match=r"'lossless' has no option 'keep_ratio' \(options: none\)"):
        kvprune.get_policy("lossless:keep_ratio=0.5")


@given(conversations())
def test_lossless_leaves_every_layer_to_the_eviction_of_what_decoding_cannot_see(visibility):
    view = make_view(visibility, captured_queries=None, captured_raw_keys=None)
    assert Lossless().needs == frozenset()
    assert Lossless().select(view) == Decision()
    assert not Lossless.keeps_invisible
