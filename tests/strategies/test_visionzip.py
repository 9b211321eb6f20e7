"""`visionzip` against the method's definition, written with loops."""

import math
from fractions import Fraction

import pytest
from class_tokens import choose_from, class_tokens, large, make_seen, members_of, require_joins
from helpers import (
    conversations,
    exact_budget,
    kept_sets,
    make_visibility,
    slow_groups,
    slow_strata,
)
from hypothesis import given
from hypothesis import strategies as st
from kvprune_strategies import VisionZip

from kvprune.errors import PolicyOptionError

ratios = st.integers(1, 100).map(lambda percent: percent / 100)
shares = st.sampled_from([0.01, 0.5, 0.84, 1.0])
choices = st.sampled_from(["keep", "rank"])


def expected(policy, view, sample):
    """What is kept, and what of it attention alone would keep."""
    kept, dominant = set(), set()
    classes, groups = class_tokens(view, sample), slow_groups(view.visibility, sample)
    paid = view.class_attention[sample].tolist()
    if policy.class_tokens == "keep":
        paid = [number + 2 * (column in classes) for column, number in enumerate(paid)]
    for stratum in filter(None, slow_strata(view.visibility, sample)):
        limit = exact_budget(policy.keep_ratio, len(stratum))
        back = math.floor(limit * (1 - Fraction(str(policy.dominant))))
        if policy.targets == "stride":
            some, best = choose_by_stride(stratum, groups, paid, limit, back)
        else:
            some, best = choose_from(stratum, groups, paid, limit, back)
        kept |= some
        dominant |= best
    return kept, dominant


def choose_by_stride(columns, groups, paid, limit, back):
    """As `choose_from`, but every n-th of what is not best is kept."""
    by_paid = sorted(columns, key=lambda column: (-paid[column], column))
    best = set(by_paid[: limit - back])
    rest = sorted(columns - best)
    chosen = best | (set(rest[:: max(1, len(rest) // back)][:back]) if back else set())
    first = {min(group & columns, key=by_paid.index) for group in groups if group & columns}
    if len(first) <= 1:
        return chosen | first, best
    others = sorted(columns - first, key=lambda column: (column not in chosen, by_paid.index(column)))
    return first | set(others[: max(0, limit - len(first))]), best


def require_definition(policy, view):
    """What is kept, who joined whom, and the weights are those of the definition."""
    visibility = view.visibility
    onward = policy.choose(view).onward
    for sample in range(visibility.batch):
        wanted, dominant = expected(policy, view, sample)
        if not wanted:
            continue
        assert kept_sets(onward)[sample][0] == wanted
        members, marked = members_of(onward, sample), class_tokens(view, sample)
        takers = wanted - dominant - marked
        require_joins(view, sample, members, takers, marked, slow_groups(visibility, sample))
        for anchor, bucket in members.items():
            assert len(bucket) == 1 or anchor in takers
            assert list(bucket.values()) == pytest.approx([1 / len(bucket)] * len(bucket))


@given(
    conversations(),
    ratios,
    shares,
    choices,
    st.sampled_from(["even", "stride"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 3),
)
def test_the_choice_and_the_merge_are_those_of_the_definition(
    visibility, ratio, share, class_option, targets, classes, ties, seed
):
    view = make_seen(visibility, seed=seed, classes=classes, ties=ties)
    options = {"dominant": share, "class_tokens": class_option, "targets": targets}
    require_definition(VisionZip(keep_ratio=ratio, **options), view)


@pytest.mark.parametrize("class_option", ["keep", "rank"])
@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.6])
@pytest.mark.parametrize("classes", [True, False])
def test_large_images_too(class_option, ratio, classes):
    for seed in range(8):
        view = make_seen(large(), seed=seed, classes=classes)
        require_definition(VisionZip(keep_ratio=ratio, dominant=0.6, class_tokens=class_option), view)


@given(conversations(), ratios, st.integers(0, 3))
def test_sum_adds_the_mean_of_the_members_to_the_target(visibility, ratio, seed):
    view = make_seen(visibility, seed=seed)
    mean, total = (
        VisionZip(keep_ratio=ratio, dominant=0.5, merge=how).choose(view).onward for how in ("avg", "sum")
    )
    for sample in range(visibility.batch):
        buckets = members_of(total, sample)
        assert {a: set(b) for a, b in members_of(mean, sample).items()} == {
            a: set(b) for a, b in buckets.items()
        }
        for anchor, bucket in buckets.items():
            assert bucket[anchor] == 1
            others = [weight for column, weight in bucket.items() if column != anchor]
            assert others == pytest.approx([1 / len(others)] * len(others) if others else [])


def test_of_64_tokens_54_are_dominant_and_10_contextual():
    view = make_seen(make_visibility([[[1]]], 576))
    onward = VisionZip(keep_tokens=64).choose(view).onward
    sizes = [len(bucket) for bucket in members_of(onward, 0).values()]
    assert len(sizes) == 64
    assert sum(sizes) == 576
    best = set(view.class_attention[0].topk(54).indices.tolist())
    assert best <= kept_sets(onward)[0][0]
    assert all(len(members_of(onward, 0)[column]) == 1 for column in best)
    targets = sorted(kept_sets(onward)[0][0] - best)
    gaps = [b - a for a, b in zip([0, *targets], [*targets, 576], strict=True)]
    assert max(gaps) <= 144  # twice 57.6 where halving has not come to the end


@given(conversations(), ratios)
def test_without_contextual_tokens_nothing_is_merged(visibility, ratio):
    onward = VisionZip(keep_ratio=ratio, dominant=1.0).choose(make_seen(visibility)).onward
    for sample in range(visibility.batch):
        if len(slow_groups(visibility, sample)) == 1:
            assert all(len(bucket) == 1 for bucket in members_of(onward, sample).values())


def test_only_even_targets_promise_that_a_larger_budget_keeps_a_superset():
    assert VisionZip().ranks_tokens
    assert not VisionZip(targets="stride").ranks_tokens


def test_class_tokens_come_first_or_last():
    view = make_seen(make_visibility([[[1, 1]]], 5), classes=True)
    assert {0, 5} < kept_sets(VisionZip(keep_tokens=4).choose(view).onward)[0][0]
    assert kept_sets(VisionZip(keep_tokens=1).choose(view).onward) == [[{0}]]
    rest = VisionZip(keep_tokens=8, dominant=1.0, class_tokens="rank").choose(view).onward
    assert kept_sets(rest) == [[set(range(10)) - {0, 5}]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dominant": 0.0}, r"dominant is a share of the budget in \(0, 1\], got 0.0"),
        ({"dominant": 1.2}, "dominant is a share"),
        ({"merge": "max"}, r"must be avg \| sum"),
        ({"targets": "random"}, r"must be even \| stride"),
        ({"class_tokens": "drop"}, r"must be keep \| rank"),
    ],
)
def test_wrong_options_are_refused_with_what_would_be_right(options, message):
    with pytest.raises(PolicyOptionError, match=message):
        VisionZip(**options)
