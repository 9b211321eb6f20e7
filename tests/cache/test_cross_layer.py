"""What a cache layer says it will hold, and holds; `cache_machine` tests what may be done with it."""

from __future__ import annotations

import pytest
import torch

from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.cache.retention import retained
from kvprune.cache.shared_rows import SharedRows
from kvprune.tokens.selection import Selection


def numbers(batch, columns, first=0.0):
    keys = first + torch.arange(batch * columns, dtype=torch.float32).reshape(batch, 1, columns, 1)
    return keys, -keys


def kept(*rows):
    return Selection.from_mask(torch.tensor(rows, dtype=torch.bool)[:, None])


def test_an_empty_layer_expects_all_columns_in_order():
    layer = CrossKVLayer()
    arrival = layer.expect(None, 4)
    assert arrival.contents.slots is None
    assert not arrival.contents.ragged
    layer.update(*numbers(1, 4))
    assert layer.columns == layer.width == 4
    assert layer.slots is None


def test_what_is_expected_is_what_is_held_afterwards():
    layer, survivors = CrossKVLayer(), kept([1, 0, 1, 1], [0, 1, 0, 0])
    arrival = layer.expect(survivors, 4)
    assert arrival.received is survivors
    assert arrival.contents.ragged
    layer.update(*numbers(2, 3))
    assert layer.columns == 4
    assert layer.slots is arrival.contents.slots  # masks are found by the identity of the slots
    assert layer.valid is arrival.contents.valid
    assert layer.contents.copies == 1


def test_later_columns_join_earlier_ones_and_have_no_bias():
    layer = CrossKVLayer()
    layer.update(*numbers(1, 2))
    layer.slots, layer.valid = torch.tensor([[[0, 1]]]), torch.ones(1, 1, 2, dtype=torch.bool)
    layer.bias = torch.tensor([[[0.5, 0.0]]])
    arrival = layer.expect(kept([0, 1]), 2)
    assert arrival.contents.slots.tolist() == [[[0, 1, 3]]]
    assert arrival.contents.bias.tolist() == [[[0.5, 0.0, 0.0]]]
    keys, _ = layer.update(*numbers(1, 1, first=9.0))
    assert keys.flatten().tolist() == [0.0, 1.0, 9.0]
    assert layer.columns == 4


def test_rows_that_are_copies_are_held_once():
    layer = CrossKVLayer()
    keys, values = numbers(1, 3)
    layer.expect(None, 3, SharedRows(2))
    layer.update(keys.repeat(2, 1, 1, 1), values.repeat(2, 1, 1, 1))
    assert layer.keys.shape[0] == 1
    assert layer.spread()[0].shape[0] == 2
    assert layer.bytes_full == 2 * layer.bytes_held


def test_keeping_everything_changes_nothing():
    layer = CrossKVLayer()
    layer.update(*numbers(1, 3))
    before = layer.keys
    assert retained(layer, kept([1, 1, 1])) is None
    layer.retain(kept([1, 1, 1]))
    assert layer.keys is before
    assert layer.slots is None


def test_what_is_dropped_is_freed_and_columns_keep_their_numbers():
    layer = CrossKVLayer()
    layer.update(*numbers(1, 4))
    layer.retain(kept([0, 1, 0, 1]))
    assert layer.slots.tolist() == [[[1, 3]]]
    assert layer.keys.flatten().tolist() == [1.0, 3.0]
    assert layer.bytes_behind == layer.bytes_held == 2 * 2 * 4
    layer.retain(kept([0, 1]))  # of the entries that are held now
    assert layer.slots.tolist() == [[[3]]]


def test_a_selection_of_the_policy_is_not_held_itself():
    layer, selection = CrossKVLayer(), kept([0, 1, 1])
    layer.update(*numbers(1, 3))
    layer.retain(selection)
    selection.valid.zero_()
    selection.indices.zero_()
    assert layer.slots.tolist() == [[[1, 2]]]
    assert bool(layer.valid.all())


@pytest.mark.parametrize("heads", [1, 2])
def test_heads_may_keep_different_entries(heads):
    layer = CrossKVLayer()
    keys = torch.arange(6.0).reshape(1, 2, 3, 1)
    layer.update(keys, -keys)
    mask = torch.tensor([[[1, 1, 0], [0, 1, 1]]], dtype=torch.bool)[:, :heads]
    layer.retain(Selection.from_mask(mask))
    wanted = [[0.0, 1.0], [3.0, 4.0] if heads == 1 else [4.0, 5.0]]
    assert layer.keys[0, ..., 0].tolist() == wanted
