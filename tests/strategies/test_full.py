"""`full` decides nothing, and lets nothing be evicted."""

import pytest
from helpers import conversations, make_view
from hypothesis import given
from kvprune_strategies import Full, kvprune_policies

import kvprune
from kvprune import Decision
from kvprune.errors import PolicyOptionError


def test_full_is_found_by_its_name_and_has_no_options():
    assert kvprune.get_policy("full") == Full()
    assert Full.option_types() == {}
    assert str(Full().spec) == "full"
    with pytest.raises(PolicyOptionError, match="'full' has no option 'keep_tokens'"):
        kvprune.get_policy("full:keep_tokens=3")


@given(conversations())
def test_full_changes_no_layer_and_needs_nothing(visibility):
    view = make_view(visibility, captured_queries=None, captured_raw_keys=None)
    assert Full().needs == frozenset()
    assert Full().select(view) == Decision()


def test_full_is_the_only_built_in_policy_that_holds_on_to_what_decoding_cannot_see():
    assert [cls.name for cls in kvprune_policies() if cls.keeps_invisible] == ["full"]


@pytest.mark.parametrize("cls", kvprune_policies(), ids=lambda cls: cls.name)
def test_every_built_in_policy_is_usable_documented_and_says_what_it_costs(cls):
    assert cls.check_class() is None
    assert kvprune.get_policy(cls.name) == cls()
    assert kvprune.get_policy(cls().spec) == cls()
    assert cls.cost
    assert cls.fidelity in ("faithful", "adapted", "inspired-by", "baseline")
    assert cls.__doc__
    assert "(*, " not in cls.__doc__, "the docstring that dataclass generates"
    assert bool(cls.paper) == (cls.fidelity != "baseline")
    for option in cls.option_types():
        inherited = option in {
            **kvprune.ScoringPolicy.option_types(),
            **kvprune.TrainedPolicy.option_types(),
        }
        assert inherited or f"{option}:" in cls.__doc__
