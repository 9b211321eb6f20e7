"""What an author writes: a policy of fifteen lines works, and what cannot rank tokens is refused."""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
import torch
from helpers import (
    alone,
    conversations,
    exact_budget,
    kept_sets,
    make_view,
    make_visibility,
    slow_decode,
    slow_groups,
    slow_strata,
    visibilities,
)
from hypothesis import given
from hypothesis import strategies as st

import kvprune
from kvprune import CrossKVPolicy, Decision, PolicySpec, ScoringPolicy, Selection, onward_decision
from kvprune.errors import BudgetError, PolicyOptionError, ScoreError, SelectionError, SpecError


@dataclass(frozen=True, kw_only=True)
class ValueSpread(kvprune.ScoringPolicy):
    """Keep the tokens whose values differ most from the mean value."""

    name = "value-spread"
    version = 1

    def score(self, view):
        values = view.values.float()
        return (values - values.mean(2, keepdim=True)).norm(dim=-1)


@dataclass(frozen=True, kw_only=True)
class Given(ScoringPolicy):
    """Return scores that the test has prepared."""

    name = "given"
    answer: ClassVar[object] = None

    def score(self, view):
        return self.answer(view)


def answering(answer, **options):
    """A policy whose ``score`` is ``answer``."""
    cls = dataclass(frozen=True, kw_only=True)(type("Answering", (Given,), {"answer": staticmethod(answer)}))
    return cls(**options)


@dataclass(frozen=True, kw_only=True)
class Typed(CrossKVPolicy):
    """One option of each type."""

    name = "typed"
    flag: bool = False
    count: int = 3
    factor: float = 0.5
    label: str = "x"
    side: Literal["high", "low"] = "high"
    limit: float | None = None

    def select(self, view):
        return Decision()


# the example of an author


@given(conversations(max_batch=2), st.integers(1, 100))
def test_fifteen_lines_keep_the_tokens_that_score_highest(visibility, percent):
    view = make_view(visibility, dtype=torch.float32)
    decision = ValueSpread(keep_ratio=percent / 100).select(view)
    assert decision.onward is None
    kept = kept_sets(decision.cache)
    for sample in range(visibility.batch):
        seen = sorted(slow_strata(visibility, sample)[0])
        for head in range(2):
            values = view.values[sample, head]
            spread = (values - values.mean(0)).norm(dim=-1)
            order = sorted(seen, key=lambda column, spread=spread: (-float(spread[column]), column))
            assert kept[sample][head] == set(order[: exact_budget(percent / 100, len(seen))])


def test_an_author_needs_no_option_to_get_half():
    policy = ValueSpread()
    assert (policy.keep_ratio, policy.keep_tokens, policy.reach) == (None, None, "layer")
    assert policy.budget == policy.exact_budget == kvprune.Budget(keep_ratio=0.5)
    assert (policy.stated_budget, policy.requested) == ({}, {"keep_ratio": 0.5})
    assert policy.needs == frozenset()
    assert policy.ranks_tokens
    assert ValueSpread.check_class() is None


@given(visibilities(), st.integers(1, 100))
def test_the_budget_is_exact_for_each_sample_and_head(visibility, percent):
    selection = ValueSpread(keep_ratio=percent / 100).select(make_view(visibility)).cache
    for sample in range(visibility.batch):
        stratum = slow_strata(visibility, sample)[0]
        groups = [group for group in slow_groups(visibility, sample) if group & stratum]
        wanted = max(exact_budget(percent / 100, len(stratum)), len(groups))
        assert selection.counts[sample].tolist() == [wanted, wanted]
        assert all(kept <= stratum for kept in kept_sets(selection)[sample])


@given(conversations(), st.sampled_from(["layer", "onward"]), st.integers(1, 6))
def test_a_sample_keeps_alone_what_it_keeps_in_a_batch(visibility, reach, tokens):
    view = make_view(visibility)
    policy = ValueSpread(keep_tokens=tokens, reach=reach)
    together = policy.select(view)
    for sample in range(visibility.batch):
        by_itself = policy.select(alone(view, sample))
        assert kept_sets(by_itself.cache)[0] == kept_sets(together.cache)[sample]
        if reach == "onward":
            assert kept_sets(by_itself.onward)[0] == kept_sets(together.onward)[sample]


def test_select_is_the_frameworks_own():
    assert ScoringPolicy.select.__final__


# reach


@given(conversations(), st.integers(1, 100))
def test_reach_onward_decides_once_for_all_layers_by_the_average_over_heads(visibility, percent):
    view = make_view(visibility)
    policy = ValueSpread(keep_ratio=percent / 100, reach="onward")
    decision = policy.select(view)
    assert decision.onward.indices.shape[1] == 1
    average = policy.score(view).double().mean(1)
    for sample in range(visibility.batch):
        expected = set()
        for stratum in slow_strata(visibility, sample):
            order = sorted(stratum, key=lambda column, row=sample: (-float(average[row, column]), column))
            expected |= set(order[: exact_budget(percent / 100, len(stratum))])
        assert kept_sets(decision.onward)[sample] == [expected]
        decode = slow_decode(visibility, sample)
        assert kept_sets(decision.cache)[sample] == [expected & decode if decode else expected]
    assert policy.select(dataclasses.replace(view, rank=1)) == Decision()


def test_reach_layer_decides_at_every_layer_and_by_head():
    view = make_view(make_visibility([[[1]] * 2], 12))
    policy = ValueSpread(keep_ratio=0.5)
    for rank in range(3):
        decision = policy.select(dataclasses.replace(view, rank=rank))
        assert decision.onward is None
        first, second = kept_sets(decision.cache)[0]
        assert len(first) == len(second) == 6
        assert first != second


def test_onward_decision_leaves_the_deciding_cache_alone_if_asked():
    # Two images; decoding sees the second only.
    view = make_view(make_visibility([[[1, 0], [0, 1]]], 2, images=[0, 1]))
    kept = torch.tensor([[[True, False, False, True]]])
    here = onward_decision(view, kept)
    assert kept_sets(here.onward) == [[{0, 3}]]
    assert kept_sets(here.cache) == [[{3}]]
    later = onward_decision(view, kept, crop_here=False)
    assert later.onward == here.onward
    assert later.cache is None


@pytest.mark.parametrize("reach", ["layer", "onward"])
def test_a_batch_in_which_only_one_sample_gets_a_new_image_is_decided(reach):
    # The second sample goes on looking at its earlier image, whose columns are not part of this view.
    visibility = make_visibility([[[0, 1]], [[1, 0]]], 4, images=[0, 1]).from_column(4)
    decision = ValueSpread(keep_ratio=0.5, reach=reach).select(make_view(visibility))
    assert [len(kept) for kept in kept_sets(decision.cache)[0]] == [2] * decision.cache.indices.shape[1]


# scores


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        (lambda view: view.values.norm(dim=-1)[:, 0], r"shape \[2, 6\]"),
        (lambda view: view.values, r"shape \[2, 2, 6, 4\]"),
        (lambda view: view.values.norm(dim=-1)[..., :5], r"shape \[2, 2, 5\]"),
        (lambda view: view.values.norm(dim=-1)[:1], r"shape \[1, 2, 6\]"),
        (lambda view: view.captured.queries.norm(dim=-1), r"shape \[2, 4, 3\]"),
        (lambda view: torch.rand(2, 4, 6), r"shape \[2, 4, 6\]"),
        (lambda view: torch.tensor(0.0), r"shape \[\]"),
        (lambda view: None, "NoneType"),
        (lambda view: [[0.0] * 6], "list"),
        (lambda view: view.values.norm(dim=-1).numpy(), "ndarray"),
        (lambda view: view.values.norm(dim=-1) * torch.nan, "NaN for 24 tokens that could be kept"),
    ],
)
@pytest.mark.parametrize("reach", ["layer", "onward"])
def test_what_cannot_rank_tokens_is_refused_with_policy_layer_and_expected_shape(answer, got, reach):
    view = make_view(make_visibility([[[1]] * 3] * 2, 6), layer_idx=13)
    policy = answering(answer, reach=reach)
    with pytest.raises(ScoreError, match=rf"'given' at layer 13.*{got}.*\[2, 2 or 1, 6\]"):
        policy.select(view)


def test_complex_scores_are_refused_with_their_type():
    view = make_view(make_visibility([[[1]]], 6), layer_idx=13)
    policy = answering(lambda view: torch.ones(1, 1, 6, dtype=torch.complex64))
    with pytest.raises(ScoreError, match=r"'given' at layer 13.*complex64"):
        policy.select(view)


def test_a_score_error_is_a_selection_error():
    view = make_view(make_visibility([[[1]]], 6))
    with pytest.raises(SelectionError, match="NoneType"):
        answering(lambda view: None).select(view)


def test_one_nan_at_a_visible_token_is_refused_and_counted():
    def score(view):
        scores = torch.zeros(1, 2, 4)
        scores[0, 1, 2] = torch.nan
        return scores

    view = make_view(make_visibility([[[1, 0]]], [3, 1]))
    with pytest.raises(ScoreError, match="NaN for 1 tokens that could be kept"):
        answering(score).select(view)


@pytest.mark.parametrize("reach", ["layer", "onward"])
@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf])
def test_columns_that_nobody_sees_may_hold_anything(reach, rubbish):
    visibility = make_visibility([[[1, 0]]], 4)
    scores = torch.tensor([1.0, 3, 2, 0]).repeat(1, 2, 2)
    scores[..., 4:] = rubbish
    decision = answering(lambda view: scores, reach=reach).select(make_view(visibility))
    assert all(kept == {1, 2} for kept in kept_sets(decision.cache)[0])


def test_a_layer_does_not_mind_nan_at_columns_that_only_prefill_sees():
    visibility = make_visibility([[[1, 0], [0, 1]]], 2, images=[0, 1])
    scores = torch.tensor([[[math.nan, math.nan, 1.0, 2.0]]])
    assert kept_sets(answering(lambda view: scores).select(make_view(visibility)).cache) == [[{3}]]
    with pytest.raises(ScoreError, match="NaN for 2 tokens that could be kept"):
        answering(lambda view: scores, reach="onward").select(make_view(visibility))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.float64,
    ],
)
@pytest.mark.parametrize("reach", ["layer", "onward"])
def test_scores_of_any_real_type_rank_tokens(dtype, reach):
    view = make_view(make_visibility([[[1]]], 6))
    scores = torch.tensor([0, 1, 1, 0, 0, 1]).to(dtype).expand(1, 2, 6)
    decision = answering(lambda view: scores, reach=reach).select(view)
    assert all(kept == {1, 2, 5} for kept in kept_sets(decision.cache)[0])


def test_whole_numbers_beyond_float32_still_rank():
    base = 2**30
    scores = torch.tensor([[[base, base + 1, base + 2, base + 3]]])
    view = make_view(make_visibility([[[1]]], 4))
    assert kept_sets(answering(lambda view: scores).select(view).cache) == [[{2, 3}]]


def test_one_row_of_scores_serves_all_heads():
    view = make_view(make_visibility([[[1]]], 6), kv_heads=2)
    selection = answering(lambda view: view.random()).select(view).cache
    assert selection.indices.shape == (1, 1, 3)


@pytest.mark.parametrize("reach", ["layer", "onward"])
def test_infinite_scores_are_first_and_last(reach):
    scores = torch.tensor([[[0.0, math.inf, -math.inf, 1.0], [0.0, math.inf, -math.inf, 1.0]]])
    view = make_view(make_visibility([[[1]]], 4))
    for tokens, expected in [(1, {1}), (2, {1, 3}), (3, {0, 1, 3}), (4, {0, 1, 2, 3})]:
        decision = answering(lambda view: scores, reach=reach, keep_tokens=tokens).select(view)
        assert all(kept == expected for kept in kept_sets(decision.cache)[0])


def test_opposite_infinities_of_two_heads_do_not_become_nan():
    scores = torch.tensor([[[math.inf, 0.0, 1.0], [-math.inf, 0.0, 1.0]]])
    view = make_view(make_visibility([[[1]]], 3))
    decision = answering(lambda view: scores, reach="onward", keep_tokens=1).select(view)
    assert kept_sets(decision.onward) == [[{2}]]


@given(visibilities())
def test_a_decision_does_not_write_to_the_view(visibility):
    view = make_view(visibility)
    before = {
        field.name: value.clone()
        for field in dataclasses.fields(view)
        if isinstance(value := getattr(view, field.name), torch.Tensor)
    }
    ValueSpread().select(view)
    for name, value in before.items():
        assert torch.equal(getattr(view, name), value), name


# the classes


@pytest.mark.parametrize("cls", [CrossKVPolicy, ScoringPolicy])
def test_the_base_classes_cannot_be_instantiated(cls):
    with pytest.raises(TypeError, match=f"abstract class {cls.__name__}"):
        cls()


@pytest.mark.parametrize(
    ("cls", "missing"), [(CrossKVPolicy, "select"), (ScoringPolicy, "score")], ids=lambda value: str(value)
)
def test_check_class_refuses_an_abstract_class_and_says_what_is_missing(cls, missing):
    with pytest.raises(TypeError, match=rf"{cls.__name__} is abstract: it does not define {missing}"):
        cls.check_class()


def test_check_class_refuses_a_class_without_a_name():
    @dataclass(frozen=True, kw_only=True)
    class Nameless(ScoringPolicy):
        def score(self, view):
            return view.random()

    with pytest.raises(TypeError, match=r'Nameless has no name; add the class attribute `name = "\.\.\."`'):
        Nameless.check_class()


def test_check_class_refuses_a_name_that_no_spec_can_hold():
    @dataclass(frozen=True, kw_only=True)
    class Shouting(ScoringPolicy):
        name = "My Policy"

        def score(self, view):
            return view.random()

    with pytest.raises(SpecError, match="'My Policy' is not a policy name"):
        Shouting.check_class()


@pytest.mark.parametrize("version", ["1", 1.0, True, None])
def test_check_class_refuses_a_version_that_is_no_whole_number(version):
    cls = type("Odd", (ValueSpread,), {"version": version})
    with pytest.raises(TypeError, match=f"Odd has the version {version!r}"):
        cls.check_class()


def test_check_class_refuses_a_class_without_the_dataclass_decorator():
    class Undecorated(ScoringPolicy):
        name = "undecorated"
        sharpness: float = 2.0

        def score(self, view):
            return view.random()

    with pytest.raises(TypeError, match=r"Undecorated is no frozen dataclass; add @dataclass\(frozen=True"):
        Undecorated.check_class()


def test_check_class_refuses_a_name_that_has_become_an_option():
    @dataclass(frozen=True, kw_only=True)
    class Annotated(ScoringPolicy):
        name: str = "annotated"

        def score(self, view):
            return view.random()

    with pytest.raises(TypeError, match=r"Annotated.*name"):
        Annotated.check_class()


def test_check_class_refuses_an_option_of_a_type_that_no_spec_can_hold():
    @dataclass(frozen=True, kw_only=True)
    class Listed(CrossKVPolicy):
        name = "listed"
        layers: tuple[int, ...] = ()

        def select(self, view):
            return Decision()

    with pytest.raises(TypeError, match=r"Listed.*layers"):
        Listed.check_class()


def test_python_itself_refuses_a_dataclass_that_is_not_frozen():
    with pytest.raises(TypeError, match="cannot inherit non-frozen dataclass from a frozen one"):

        @dataclass
        class Soft(ScoringPolicy):
            name = "soft"


# options


def test_options_cannot_be_changed_or_added():
    policy = ValueSpread(keep_ratio=0.25)
    for option, value in [("keep_ratio", 0.5), ("reach", "onward"), ("extra", 1), ("name", "other")]:
        with pytest.raises(dataclasses.FrozenInstanceError, match=option):
            setattr(policy, option, value)
    with pytest.raises(dataclasses.FrozenInstanceError, match="keep_ratio"):
        del policy.keep_ratio
    assert policy == ValueSpread(keep_ratio=0.25)


def test_options_are_keyword_only():
    with pytest.raises(TypeError, match="positional argument"):
        ValueSpread(0.5)


def test_policies_with_the_same_options_are_equal_and_hash_alike():
    assert ValueSpread(keep_ratio=0.5) == ValueSpread()
    assert hash(ValueSpread(keep_ratio=0.5)) == hash(ValueSpread())
    assert ValueSpread(keep_ratio=0.25) != ValueSpread()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flag": 1}, "option 'flag' of policy 'typed' must be true or false, got 1"),
        ({"count": 2.0}, r"option 'count' of policy 'typed' must be whole number, got 2\.0"),
        ({"count": True}, "option 'count' of policy 'typed' must be whole number, got True"),
        ({"factor": math.nan}, "option 'factor' of policy 'typed' must be number, got nan"),
        ({"factor": math.inf}, "option 'factor' of policy 'typed' must be number, got inf"),
        ({"label": 3}, "option 'label' of policy 'typed' must be text, got 3"),
        ({"side": "left"}, r"option 'side' of policy 'typed' must be high \| low, got 'left'"),
        ({"limit": False}, "option 'limit' of policy 'typed' must be number or none, got False"),
    ],
)
def test_an_option_of_the_wrong_type_is_refused_from_python_and_from_data(options, message):
    with pytest.raises(PolicyOptionError, match=message):
        Typed(**options)
    with pytest.raises(PolicyOptionError, match=message):
        Typed.from_options(options)


def test_text_options_are_read_by_type():
    text = {"flag": "true", "count": "7", "factor": "2", "label": "1", "side": "low", "limit": "none"}
    assert Typed.from_options(text) == Typed(
        flag=True, count=7, factor=2.0, label="1", side="low", limit=None
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("factr", "policy 'typed' has no option 'factr'; did you mean 'factor'"),
        ("Count", "has no option 'Count'; did you mean 'count'"),
        ("zzz", r"has no option 'zzz' \(options: count, factor, flag, label, limit, side\)"),
        ("name", "has no option 'name'"),
        ("version", "has no option 'version'"),
    ],
)
def test_an_unknown_option_names_the_closest_and_lists_all(option, message):
    with pytest.raises(PolicyOptionError, match=message):
        Typed.from_options({option: "1"})


def test_an_unknown_option_of_a_policy_without_options_says_none():
    with pytest.raises(
        PolicyOptionError, match=r"policy 'full' has no option 'keep_ratio' \(options: none\)"
    ):
        kvprune.get_policy("full:keep_ratio=0.5")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratio": 0.0}, r"keep_ratio.*got 0\.0"),
        ({"keep_ratio": 1.5}, r"keep_ratio.*got 1\.5"),
        ({"keep_tokens": 0}, "keep_tokens.*got 0"),
        ({"keep_ratio": 0.5, "keep_tokens": 4}, r"keep_ratio=0\.5 and keep_tokens=4"),
    ],
)
def test_an_impossible_budget_is_refused_when_the_policy_is_made(options, message):
    with pytest.raises(BudgetError, match=message):
        ValueSpread(**options)


@dataclass(frozen=True, kw_only=True)
class Adaptive(kvprune.BudgetPolicy):
    """Finds a number of tokens itself, unless a budget or a share of something else is stated."""

    name = "adaptive"
    share: float | None = None
    budget_alternatives = ("share",)
    default_ratio = None

    def select(self, view):
        return Decision()


def test_a_policy_may_have_no_default_budget_and_another_option_in_its_place():
    assert (Adaptive().exact_budget, Adaptive().stated_budget, Adaptive().requested) == (None, {}, {})
    assert Adaptive().spec == Adaptive().nested_spec == PolicySpec("adaptive", {}, 1)
    with pytest.raises(BudgetError, match="policy 'adaptive' state no budget, and it has no default"):
        Adaptive().budget  # noqa: B018
    share = Adaptive(share=0.25)
    assert (share.exact_budget, share.requested) == (None, {"share": 0.25})
    assert share.budget == kvprune.Budget(keep_ratio=0.25)
    assert Adaptive(keep_tokens=3).exact_budget == kvprune.Budget(keep_tokens=3)
    with pytest.raises(BudgetError, match=r"share of policy 'adaptive' is a fraction in \(0, 1\], got 1\.5"):
        Adaptive(share=1.5)
    with pytest.raises(BudgetError, match=r"or keep_tokens or share, got keep_tokens=3 and share=0\.5"):
        Adaptive(share=0.5, keep_tokens=3)


BUILT_IN = {name: kvprune.get_policy(name) for name in kvprune.list_policies()}
BUDGETED = [name for name, policy in BUILT_IN.items() if "keep_ratio" in policy.option_values]


@pytest.mark.parametrize("name", BUDGETED)
def test_a_default_budget_can_be_replaced(name):
    policy = kvprune.get_policy(name)
    assert (policy.keep_ratio, policy.keep_tokens) == (None, None)
    for option, value in [("keep_ratio", 0.3), ("keep_tokens", 3)]:
        other = dataclasses.replace(policy, **{option: value})
        assert other == kvprune.get_policy(f"{name}:{option}={value}")
        assert other.requested[option] == value
        assert other.spec.options[option] == value
        assert other != policy
    again = dataclasses.replace(policy)
    assert again == policy
    assert (again.keep_ratio, hash(again)) == (None, hash(policy))


def test_equality_that_a_class_defines_itself_is_kept():
    @dataclass(frozen=True, kw_only=True)
    class Alike(ValueSpread):
        name = "alike"

        def __eq__(self, other):
            return isinstance(other, Alike)

        def __hash__(self):
            return 1

    assert Alike(keep_ratio=0.1) == Alike(keep_ratio=0.2)
    assert ValueSpread(keep_ratio=0.1) != 3


def test_needs_may_be_a_class_attribute_or_a_property():
    class Constant(ValueSpread):
        name = "constant"
        needs = frozenset({"queries"})

    class Depends(ValueSpread):
        name = "depends"

        @property
        def needs(self):
            return frozenset({"queries"} if self.reach == "onward" else ())

    make = dataclass(frozen=True, kw_only=True)
    assert make(Constant)().needs == {"queries"}
    assert make(Depends)().needs == frozenset()
    assert Depends(reach="onward").needs == {"queries"}


def test_a_missing_option_is_an_option_error_that_names_it():
    @dataclass(frozen=True, kw_only=True)
    class Demanding(CrossKVPolicy):
        name = "demanding"
        strength: float

        def select(self, view):
            return Decision()

    with pytest.raises(PolicyOptionError, match=r"'demanding'.*'strength'"):
        Demanding.from_options({})


@given(
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.from_regex(r"[a-z0-9._-]{1,8}", fullmatch=True),
    st.sampled_from(["high", "low"]),
    st.none() | st.floats(allow_nan=False, allow_infinity=False),
)
def test_the_spec_of_a_policy_builds_it_again(flag, count, factor, label, side, limit):
    policy = Typed(flag=flag, count=count, factor=factor, label=label, side=side, limit=limit)
    assert Typed.from_options(policy.spec.options) == policy
    assert Typed.from_options(PolicySpec.parse(str(policy.spec)).options) == policy
    assert Typed.from_options(PolicySpec.from_json(policy.spec.to_json()).options) == policy


def test_the_spec_of_a_policy_has_what_differs_from_the_defaults_and_the_version():
    assert Typed().spec == PolicySpec("typed", {}, 1)
    assert Typed(count=4, limit=0.5).spec == PolicySpec("typed", {"count": 4, "limit": 0.5}, 1)
    assert str(ValueSpread().spec) == "value-spread:keep_ratio=0.5"
    assert str(ValueSpread(keep_tokens=64).spec) == "value-spread:keep_tokens=64"


def test_selections_of_samples_without_an_image_are_taken_from_all_columns():
    visibility = make_visibility([[[0, 0]], [[1, 0]]], 4)
    selection = ValueSpread(keep_ratio=0.5).select(make_view(visibility)).cache
    assert selection.counts.tolist() == [[4, 4], [2, 2]]
    assert isinstance(selection, Selection)
    assert selection.is_ragged
