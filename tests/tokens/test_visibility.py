"""Every question about visibility, answered a second time with plain loops over rows and columns."""

import dataclasses

import pytest
import torch
from helpers import (
    conversations,
    live_rows,
    make_visibility,
    seen_by_row,
    slow_decode,
    slow_groups,
    slow_prefill,
    slow_strata,
    visibilities,
)
from hypothesis import given
from hypothesis import strategies as st

from kvprune.tokens.visibility import Visibility

anything = st.one_of(visibilities(), visibilities(broadcast=True), conversations())


def as_mask(columns, width):
    return [column in columns for column in range(width)]


def labelled_sets(labels):
    """Sets of columns that share a label of at least 0."""
    found = {}
    for column, label in enumerate(labels):
        if label >= 0:
            found.setdefault(label, set()).add(column)
    return found


@given(anything)
def test_prefill_sees_what_some_live_row_sees(visibility):
    assert visibility.prefill.shape == (visibility.batch, visibility.columns)
    for sample in range(visibility.batch):
        expected = as_mask(slow_prefill(visibility, sample), visibility.columns)
        assert visibility.prefill[sample].tolist() == expected


@given(anything)
def test_decode_sees_what_the_last_live_row_sees(visibility):
    for sample in range(visibility.batch):
        expected = as_mask(slow_decode(visibility, sample), visibility.columns)
        assert visibility.decode[sample].tolist() == expected


@given(anything)
def test_decoding_attends_to_the_units_of_the_last_row_or_to_all_if_it_sees_none(visibility):
    for sample in range(visibility.batch):
        last_row = visibility.rows[sample, -1].tolist()
        rows = live_rows(visibility, sample)
        last_live = [False] * len(last_row)
        if rows:
            last_live = visibility.rows[sample, rows[-1] if len(visibility.rows[sample]) > 1 else 0].tolist()
        expected = [
            not any(last_row) or mine or other for mine, other in zip(last_row, last_live, strict=True)
        ]
        assert visibility.decode_units[sample].tolist() == expected


@given(anything)
def test_groups_are_columns_of_one_image_that_the_same_live_rows_see(visibility):
    several = False
    for sample in range(visibility.batch):
        labels = visibility.groups[sample].tolist()
        expected = slow_groups(visibility, sample)
        found = labelled_sets(labels)
        assert sorted(map(sorted, found.values())) == sorted(map(sorted, expected))
        assert min(labels) >= -1
        several = several or len(expected) > 1
    assert visibility.has_several_groups == several


@given(anything)
def test_strata_are_decode_first_then_each_early_group_on_its_own(visibility):
    for sample in range(visibility.batch):
        found = labelled_sets(visibility.strata[sample].tolist())
        decode, *early = slow_strata(visibility, sample)
        assert found.pop(0, set()) == decode
        assert sorted(map(sorted, found.values())) == sorted(map(sorted, early))
        assert min(visibility.strata[sample].tolist()) >= -1


@given(anything)
def test_keeping_one_column_of_each_group_starves_no_live_row(visibility):
    groups = visibility.groups
    for sample in range(visibility.batch):
        firsts = {min(columns) for columns in labelled_sets(groups[sample].tolist()).values()}
        for row in live_rows(visibility, sample):
            assert seen_by_row(visibility, sample, row) & firsts


@given(visibilities(broadcast=True))
def test_the_form_with_one_row_equals_the_same_row_repeated(short):
    long = dataclasses.replace(short, rows=short.rows.repeat(1, short.live.shape[1], 1))
    for question in ("prefill", "decode", "decode_units", "groups", "strata", "has_several_groups"):
        one, other = getattr(short, question), getattr(long, question)
        assert one == other if isinstance(one, bool) else torch.equal(one, other), question


@given(anything, st.data())
def test_from_column_sees_the_last_columns_only(visibility, data):
    first = data.draw(st.integers(0, visibility.columns - 1))
    later = visibility.from_column(first)
    assert later.columns == visibility.columns - first
    assert torch.equal(later.prefill, visibility.prefill[:, first:])
    assert torch.equal(later.decode, visibility.decode[:, first:])
    assert torch.equal(later.groups, visibility.groups[:, first:])


def test_from_column_zero_is_the_visibility_itself():
    visibility = make_visibility([[[1, 1]]], 2)
    assert visibility.from_column(0) is visibility


@given(anything, st.data())
def test_at_sees_the_chosen_columns_in_the_chosen_order(visibility, data):
    width = data.draw(st.integers(1, visibility.columns))
    order = data.draw(st.permutations(range(visibility.columns)))
    indices = torch.tensor(sorted(order[:width])).repeat(visibility.batch, 1)
    flags = data.draw(st.lists(st.booleans(), min_size=width, max_size=width))
    valid = torch.tensor(flags).repeat(visibility.batch, 1)
    chosen = visibility.at(indices, valid)
    assert chosen.columns == width
    for question in ("prefill", "decode"):
        whole = getattr(visibility, question).gather(1, indices)
        assert torch.equal(getattr(chosen, question), whole & valid)
    assert torch.equal(chosen.groups, torch.where(valid, visibility.groups.gather(1, indices), -1))


@given(anything, st.data())
def test_at_and_from_column_compose(visibility, data):
    first = data.draw(st.integers(0, visibility.columns - 1))
    later = visibility.from_column(first)
    every = torch.arange(later.columns).expand(later.batch, -1)
    same = later.at(every, torch.ones_like(every, dtype=torch.bool))
    assert torch.equal(same.decode, later.decode)
    assert torch.equal(same.strata.clamp(max=0), later.strata.clamp(max=0))


def test_padding_rows_and_drafts_do_not_count():
    rows = [[[1, 1, 1], [1, 0, 0], [0, 1, 0], [1, 1, 1]]]
    visibility = make_visibility(rows, 1, live=[[False, True, True, False]])
    assert visibility.prefill.tolist() == [[True, True, False]]
    assert visibility.decode.tolist() == [[False, True, False]]
    assert visibility.strata.tolist()[0][1:] == [0, -1]


def test_an_image_and_its_padding_tiles():
    # One of three tiles is filled; the first row stands before the image.
    visibility = make_visibility([[[0, 0, 0], [1, 0, 0]]], 2)
    assert visibility.decode.tolist() == [[True, True, False, False, False, False]]
    assert visibility.groups.tolist() == [[0, 0, -1, -1, -1, -1]]
    assert visibility.strata.tolist() == [[0, 0, -1, -1, -1, -1]]
    assert visibility.decode_units.tolist() == [[True, False, False]]
    assert not visibility.has_several_groups


def test_two_images_that_one_row_sees_are_two_groups_of_one_stratum():
    visibility = make_visibility([[[1, 1]]], 2, images=[0, 1])
    assert visibility.groups.tolist() == [[0, 0, 1, 1]]
    assert visibility.strata.tolist() == [[0, 0, 0, 0]]
    assert visibility.has_several_groups


def test_the_earlier_image_of_a_chat_is_a_stratum_of_its_own():
    visibility = make_visibility([[[1, 0, 0], [0, 1, 0]]], [2, 1, 1], images=[0, 1, 2])
    first, second, third, unseen = visibility.strata[0].tolist()
    assert first == second > 0
    assert third == 0
    assert unseen == -1


def test_every_earlier_image_is_a_stratum_of_its_own():
    rows = [[[1, 0, 0], [0, 1, 0], [0, 0, 1]]]
    visibility = make_visibility(rows, 2, images=[0, 1, 2])
    strata = visibility.strata[0].tolist()
    assert strata[0] == strata[1]
    assert strata[2] == strata[3]
    assert strata[4:] == [0, 0]
    assert len(set(strata)) == 3
    assert min(strata) == 0


def test_a_sample_without_image_attends_to_all_in_decode_and_is_one_stratum():
    visibility = make_visibility([[[0, 0]], [[1, 0]]], 2)
    assert visibility.prefill[0].tolist() == [False] * 4
    assert visibility.decode[0].tolist() == [False] * 4
    assert visibility.decode_units.tolist() == [[True, True], [True, False]]
    assert visibility.groups[0].tolist() == [-1] * 4
    assert visibility.strata.tolist() == [[0, 0, 0, 0], [0, 0, -1, -1]]


def test_columns_that_do_not_exist_are_in_no_answer():
    visibility = make_visibility([[[1]], [[0]]], 3, exists=[[1, 1, 0], [1, 1, 0]])
    assert visibility.prefill.tolist() == [[True, True, False], [False] * 3]
    assert visibility.groups.tolist() == [[0, 0, -1], [-1] * 3]
    assert visibility.strata.tolist() == [[0, 0, -1], [0, 0, -1]]


@pytest.mark.parametrize(
    ("by_unit", "expected"),
    [
        (torch.tensor([[True, False]]), [[True, True, False, False]]),
        (torch.tensor([[True, True]]), [[True, True, True, False]]),
        (torch.tensor([[5, 7]]), [[5, 5, 7, -1]]),
    ],
)
def test_by_column_spreads_units_and_marks_missing_columns(by_unit, expected):
    visibility = make_visibility([[[1, 1]]], 2, exists=[[1, 1, 1, 0]])
    assert visibility.by_column(by_unit).tolist() == expected


@given(anything)
def test_answers_do_not_write_to_what_they_were_given(visibility):
    names = [field.name for field in dataclasses.fields(Visibility)]
    before = {name: value.clone() for name in names if (value := getattr(visibility, name)) is not None}
    for question in ("prefill", "decode", "decode_units", "groups", "strata", "has_several_groups"):
        getattr(visibility, question)
    for name, value in before.items():
        assert torch.equal(getattr(visibility, name), value), name
