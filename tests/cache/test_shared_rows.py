"""Rows that are held as one: only those that are equal in all that they bring."""

from __future__ import annotations

import pytest
import torch
from generation import bart, difference_to_oracle, generate, mllama

import kvprune
from kvprune.cache.shared_rows import SharedRows, find_shared_rows
from kvprune.testing import mllama_inputs


@pytest.mark.parametrize(
    ("rows", "copies"),
    [
        ([1], 1),
        ([1, 1], 2),
        ([1, 1, 2, 2], 2),
        ([1, 1, 1, 1], 4),
        ([1, 1, 1, 1, 2, 2], 2),
        ([1, 1, 1, 2, 2, 2], 3),
        ([1, 1, 1, 2, 2], 1),  # groups of different sizes are left alone
        ([1, 2, 1, 2], 1),  # equal, but not one after the other
    ],
)
def test_the_largest_number_that_fits_the_whole_batch(rows, copies):
    ids = torch.tensor(rows)[:, None].expand(-1, 3)
    assert find_shared_rows([ids, None], []).copies == copies
    assert find_shared_rows([torch.zeros(len(rows), 2)], [None, ids]).copies == copies


def test_no_more_than_asked_for():
    ids = torch.zeros(8, 3)
    assert find_shared_rows([ids], [], most=4).copies == 4
    assert find_shared_rows([ids], [], most=3).copies == 2  # 3 does not divide 8
    assert find_shared_rows([ids], [], most=1).copies == 1


def test_what_is_not_a_number_equals_nothing():
    assert find_shared_rows([torch.zeros(2, 1)], [torch.full((2, 1), torch.nan)]).copies == 1


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "pixel_values", "aspect_ratio_ids"])
def test_rows_that_differ_in_one_thing_are_held_apart(name):
    """The same question about two pictures, two questions about one picture, ..."""
    model = mllama(torch.float64)
    inputs = {key: value.repeat(2, *[1] * (value.ndim - 1)) for key, value in one().items()}
    with kvprune.compress(model, "norm:keep_ratio=0.5") as together:
        cache = generate(model, inputs)[2]
    assert cache.layers[1].keys.shape[0] == 1
    changed = inputs[name].clone()
    if name == "attention_mask":
        changed[1, 0] = 0
    else:
        changed[1] = changed[0].flip(-1) if changed.ndim > 2 else changed[0].roll(1) % 9 + 1
    inputs = {**inputs, name: changed}
    with kvprune.compress(model, "norm:keep_ratio=0.5") as apart:
        cache = generate(model, inputs)[2]
    assert cache.layers[1].keys.shape[0] == 2
    assert apart.report.bytes_held == 2 * together.report.bytes_held
    assert difference_to_oracle(model, inputs, "norm:keep_ratio=0.5") <= 1e-6


def one():
    return mllama_inputs(["tt4ttt"], dtype=torch.float64)


def test_gradients_need_each_row_on_its_own():
    inputs = {key: value.repeat(2, *[1] * (value.ndim - 1)) for key, value in one().items()}
    model = mllama(torch.float64)
    with kvprune.compress(model, "norm"):
        cache = model(**inputs, use_cache=True).past_key_values
    assert cache.layers[1].copies == 1


def test_encoder_decoder_rows_are_held_as_one_if_they_were_repeated_after_the_encoder():
    model = bart(torch.float64)
    ids = torch.arange(4, 10)[None]
    with kvprune.compress(model, "norm"):
        beams = generate(model, {"input_ids": ids}, num_beams=3)[2]
        twice = generate(model, {"input_ids": ids.repeat(2, 1)})[2]
    assert [layer.copies for layer in beams.cross_attention_cache.layers] == [3, 3, 3]
    assert [layer.copies for layer in twice.cross_attention_cache.layers] == [1, 1, 1]


def test_reordering_asks_the_device_once_for_all_layers(monkeypatch):
    shared_rows, asked = SharedRows(2), []
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda *tensors: asked.append(1) or equal(*tensors))
    order = torch.tensor([1, 0, 3, 2])
    assert all(shared_rows.unchanged_by(order) for _ in range(8))
    assert len(asked) == 1
    order.copy_(torch.tensor([2, 0, 3, 1]))  # changed in place: asked again
    assert not shared_rows.unchanged_by(order)
