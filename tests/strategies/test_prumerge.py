"""`prumerge` against the method's definition, written with loops."""

import math
from fractions import Fraction

import pytest
import torch
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
from kvprune_strategies import PruMerge

from kvprune import get_policy
from kvprune.errors import PolicyOptionError

ratios = st.one_of(st.none(), st.integers(1, 100).map(lambda percent: percent / 100))
choices = st.sampled_from(["keep", "rank"])


def quartile(values, share):
    """Between the two nearest values, in proportion."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def expected(policy, view, sample):
    """What is kept of one sample."""
    kept, classes = set(), class_tokens(view, sample)
    groups = slow_groups(view.visibility, sample)
    plain = view.class_attention[sample].tolist()
    paid = [
        number + 2 * (policy.class_tokens == "keep" and column in classes)
        for column, number in enumerate(plain)
    ]
    share = Fraction(str(policy.spread)) if policy.plus else Fraction(0)
    if policy.keep_ratio is not None:
        for stratum in filter(None, slow_strata(view.visibility, sample)):
            limit = exact_budget(policy.keep_ratio, len(stratum))
            kept |= choose_from(stratum, groups, paid, limit, math.floor(limit * share))[0]
        return kept
    for group in groups:
        values = [plain[column] for column in group - classes]
        fence = math.inf
        if values:
            low, high = quartile(values, 0.25), quartile(values, 0.75)
            fence = high + policy.fence * (high - low)
        outliers = max(1, sum(value > fence for value in values))
        if policy.spacing == "stride":
            besides = len(group & classes) if policy.class_tokens == "keep" else 0
            kept |= choose_from(group, [group], paid, min(len(group), outliers + besides), 0)[0]
            patches = sorted(group - classes)
            step = max(1, len(patches) // outliers // 3)
            kept |= set(patches[: max(0, len(patches) - 1) : step])
            continue
        back = math.floor(outliers * share / (1 - share))
        besides = len(group & classes) if policy.class_tokens == "keep" else 0
        kept |= choose_from(group, [group], paid, min(len(group), outliers + besides + back), back)[0]
    return kept


def weights_of(policy, view, sample, anchor, bucket):
    """Weights of a kept token's members."""
    paid = view.class_attention[sample].tolist()
    if policy.merge == "sum":
        return {column: 1.0 if column == anchor else paid[column] for column in bucket}
    total = math.fsum(paid[column] for column in bucket)
    return {column: paid[column] / total if total else float(column == anchor) for column in bucket}


def require_definition(policy, view):
    """What is kept, who joined whom, and the weights are those of the definition."""
    visibility = view.visibility
    onward = policy.choose(view).onward
    for sample in range(visibility.batch):
        wanted = expected(policy, view, sample)
        if not wanted:
            continue
        assert kept_sets(onward)[sample][0] == wanted
        members, marked = members_of(onward, sample), class_tokens(view, sample)
        require_joins(view, sample, members, wanted - marked, marked, slow_groups(visibility, sample))
        if onward.merge is None:
            continue
        for anchor, bucket in members.items():
            assert bucket == pytest.approx(weights_of(policy, view, sample, anchor, bucket))


@given(conversations(), choices, st.sampled_from([0.0, 0.4, 1.5]), st.booleans(), st.integers(0, 3))
def test_the_published_stride_is_that_of_the_definition(visibility, class_option, fence, classes, seed):
    view = make_seen(visibility, seed=seed, classes=classes)
    policy = PruMerge(plus=True, spacing="stride", class_tokens=class_option, fence=fence)
    require_definition(policy, view)


def test_the_published_stride_in_large_images_too():
    policy = get_policy("prumerge:preset=published")
    for seed in range(4):
        require_definition(policy, make_seen(large(), seed=seed, classes=True))
        require_definition(policy, make_seen(make_visibility([[[1]]], 577), seed=seed, classes=True))


@given(
    conversations(),
    ratios,
    st.booleans(),
    choices,
    st.sampled_from(["sum", "avg"]),
    st.booleans(),
    st.integers(0, 3),
)
def test_the_choice_and_the_merge_are_those_of_the_definition(
    visibility, ratio, plus, class_option, merge, classes, seed
):
    view = make_seen(visibility, seed=seed, classes=classes)
    policy = PruMerge(keep_ratio=ratio, plus=plus, class_tokens=class_option, merge=merge, spread=0.6)
    require_definition(policy, view)


@pytest.mark.parametrize("class_option", ["keep", "rank"])
@pytest.mark.parametrize("ratio", [None, 0.05, 0.4])
@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize("plus", [True, False])
def test_large_images_too(class_option, ratio, classes, plus):
    for seed in range(8):
        view = make_seen(large(), seed=seed, classes=classes)
        require_definition(PruMerge(keep_ratio=ratio, plus=plus, class_tokens=class_option), view)


def test_outliers_are_kept_however_many_there_are():
    visibility = make_visibility([[[1]], [[1]], [[1]]], 20)
    paid = torch.linspace(1.0, 1.5, 20, dtype=torch.float64).repeat(3, 1)
    paid[0, [3, 7, 11]] = 9
    paid[1, 5] = 9
    view = make_seen(visibility, captured_class_attention=paid / paid.sum(1, keepdim=True))
    onward = PruMerge().choose(view).onward
    assert kept_sets(onward) == [[{3, 7, 11}], [{5}], [{19}]]  # where none stands out, the best one stays
    more = PruMerge(plus=True).choose(view).onward
    assert more.counts.tolist() == [[12], [4], [4]]
    assert [kept_sets(more)[i][0] > kept_sets(onward)[i][0] for i in range(3)] == [True] * 3
    assert PruMerge(fence=100.0).choose(view).onward.counts.tolist() == [[1], [1], [1]]


def test_what_is_as_high_as_the_fence_does_not_stand_out():
    view = make_seen(make_visibility([[[1]]], 8), captured_class_attention=torch.full((1, 8), 0.125))
    assert kept_sets(PruMerge().choose(view).onward) == [[{0}]]


def test_each_image_has_quartiles_of_its_own():
    visibility = make_visibility([[[1, 0], [1, 1]]], 20, images=[0, 1])
    paid = torch.linspace(1.0, 1.5, 20, dtype=torch.float64).repeat(1, 2)
    paid[0, 3] = 2.6
    paid[0, 20:] *= 10  # each of them would stand out beside the first image
    view = make_seen(visibility, captured_class_attention=paid)
    assert kept_sets(PruMerge().choose(view).onward) == [[{3, 39}]]


def test_a_bucket_without_attention_is_its_kept_token():
    paid = torch.zeros(1, 6, dtype=torch.float64)
    view = make_seen(make_visibility([[[1]]], 6), captured_class_attention=paid)
    onward = PruMerge(keep_tokens=2, merge="avg").choose(view).onward
    assert kept_sets(onward) == [[{0, 1}]]
    assert onward.merge.weights[0, 0].tolist() == [1, 1, 0, 0, 0, 0]


def test_what_is_asked_for():
    assert PruMerge().exact_budget is None
    assert PruMerge().requested == {}
    assert PruMerge(keep_tokens=7).requested == {"keep_tokens": 7}
    assert get_policy("prumerge:keep_ratio=0.25,plus=true") == PruMerge(keep_ratio=0.25, plus=True)


def test_the_published_stride_takes_no_budget():
    for options in ({"plus": False}, {"plus": True, "keep_ratio": 0.5}):
        with pytest.raises(PolicyOptionError, match=f"and no budget, got plus={options['plus']}"):
            PruMerge(spacing="stride", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fence": -1.0}, "fence counts distances between quartiles, at least 0, got -1.0"),
        ({"spread": 1.0}, r"spread is a share of the kept tokens in \[0, 1\), got 1.0"),
        ({"merge": "max"}, r"must be sum \| avg"),
        ({"class_tokens": "drop"}, r"must be rank \| keep"),
    ],
)
def test_wrong_options_are_refused_with_what_would_be_right(options, message):
    with pytest.raises(PolicyOptionError, match=message):
        PruMerge(**options)
