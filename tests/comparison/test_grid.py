"""Policies crossed with keep ratios."""

from __future__ import annotations

import pytest

from kvprune.comparison.plan.grid import (
    DEFAULT_KEEP_RATIOS,
    DEFAULT_POLICIES,
    answer_attention,
    expand,
    partner,
    unite,
)
from kvprune.errors import PolicyOptionError, SpecError, UnknownPolicyError
from kvprune.policy.spec import PolicySpec


def specs(*policies: str | PolicySpec, ratios: tuple[float, ...] = (0.5, 0.1)) -> list[str]:
    return [one.spec for one in expand(policies, ratios)]


def test_full_comes_first_and_once() -> None:
    assert specs("trim:keep_ratio=0.2", "full") == ["full", "trim:keep_ratio=0.2"]


def test_only_policies_without_a_stated_budget_are_crossed() -> None:
    assert specs("trim", "lossless", "trim:k_ratio=0.3", "random:keep_tokens=7", "meanpool:k=2") == [
        "full",
        "trim:keep_ratio=0.5",
        "trim:keep_ratio=0.1",
        "lossless",
        "trim:k_ratio=0.3",
        "random:keep_tokens=7",
        "meanpool:k=2",
    ]


def test_equal_configurations_run_once() -> None:
    assert specs("trim", "trim:keep_ratio=0.50", ratios=(0.5, 0.5)) == ["full", "trim:keep_ratio=0.5"]


def test_labels_and_budgets_share_the_spec_between_them() -> None:
    _, ratio, tokens = expand(
        [PolicySpec("random", {"reach": "onward", "keep_ratio": 0.25}), "norm:keep_tokens=9"], [0.5]
    )
    assert (ratio.label, ratio.budget, ratio.keep_ratio) == ("random:reach=onward", "keep_ratio=0.25", 0.25)
    assert (tokens.label, tokens.budget, tokens.keep_ratio) == ("norm", "keep_tokens=9", None)
    assert (ratio.reach, tokens.reach) == ("onward", "layer")
    assert ratio.distribution == "kvprune"


def test_default_policies_decide_at_the_same_point() -> None:
    configurations = expand(DEFAULT_POLICIES, DEFAULT_KEEP_RATIOS)
    assert len(configurations) == 2 + 8 * len(DEFAULT_KEEP_RATIOS)
    assert {one.reach for one in configurations} == {None, "onward"}


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.5, float("nan"), float("inf")])
def test_impossible_ratio_is_named(ratio: float) -> None:
    with pytest.raises(PolicyOptionError, match=f"keep ratio {ratio!r} is not a fraction"):
        expand(["trim"], [ratio])


def test_nothing_to_cross_with_is_named() -> None:
    with pytest.raises(PolicyOptionError, match="'trim:crop_first=false' states no budget"):
        expand(["trim:crop_first=false"], [])


def test_errors_of_specs_come_through() -> None:
    with pytest.raises(UnknownPolicyError, match="'nrom'; did you mean 'norm'"):
        expand(["nrom"], [0.5])
    with pytest.raises(PolicyOptionError, match="no option 'keep_ratoi'"):
        expand(["norm:keep_ratoi=0.5"], [0.5])
    with pytest.raises(SpecError, match="'norm:keep_ratio'"):
        expand(["norm:keep_ratio"], [0.5])


def test_the_partner_is_a_label_or_a_name() -> None:
    configurations = expand(
        ["norm", "norm:reach=onward", "random:reach=onward", "trim:crop_first=false"], [0.5]
    )
    assert partner("norm:reach=onward", configurations) == "norm:reach=onward"
    assert partner("trim: crop_first=false", configurations) == "trim:crop_first=false", "another spelling"
    assert partner("random", configurations) == "random", "a name"
    assert partner("trim", configurations[:3], optional=True) == "trim", "the default may be absent"
    labels = "full, norm, norm:reach=onward, random:reach=onward, trim:crop_first=false"
    for unknown in ("nrom", "keydiff", "norm:reach=nowhere", "::", ""):
        with pytest.raises(PolicyOptionError, match=f"there is no {unknown!r} to compare with.*: {labels}"):
            partner(unknown, configurations)


def test_the_reference_that_reads_the_answer_comes_last_at_each_ratio_in_use() -> None:
    wanted = expand(["trim", "norm:keep_tokens=4", "lossless"], [0.5, 0.1])
    added = [one.spec for one in answer_attention(wanted)]
    assert added == ["answer-attention:keep_ratio=0.5", "answer-attention:keep_ratio=0.1"]
    found, gone = unite([*added[:1], "keydiff:keep_ratio=0.2"], wanted, with_answer_attention=True)
    assert not gone
    assert [one.spec for one in found] == [
        "full",
        "keydiff:keep_ratio=0.2",
        *(one.spec for one in wanted[1:]),
        added[0],
        "answer-attention:keep_ratio=0.2",
        added[1],
    ]
    assert unite((), wanted, with_answer_attention=False)[0] == wanted


def test_what_does_not_run_any_more_is_named() -> None:
    found, gone = unite(["full", "gone:keep_ratio=0.5"], expand([], [0.5]), with_answer_attention=False)
    assert [one.spec for one in found] == ["full"]
    assert list(gone) == ["gone:keep_ratio=0.5"]
    assert "'gone'" in gone["gone:keep_ratio=0.5"]
