"""Rows that are held as one: only those that `generate` has made from one sample."""

from __future__ import annotations

import pytest
import torch
from generation import bart, difference_to_oracle, generate, mllama

import kvprune
from kvprune.cache.shared_rows import SharedRows, share_repeated
from kvprune.testing import mllama_inputs


@pytest.mark.parametrize(
    ("rows", "repeats", "copies"),
    [
        ([1], 1, 1),
        ([1, 1], 1, 1),  # equal, but nobody has repeated them
        ([1, 1], 2, 2),
        ([1, 1, 2, 2], 2, 2),
        ([1, 1, 1, 1], 2, 2),
        ([1, 1, 1, 2, 2, 2], 3, 3),
        ([1, 1, 1, 2, 2, 2], 2, 1),  # repeated by 2, but they differ by now
        ([1, 1, 1, 2, 2], 2, 1),  # 2 does not divide 5
        ([1, 2, 1, 2], 2, 1),
    ],
)
def test_rows_are_shared_if_they_were_repeated_and_are_still_equal(rows, repeats, copies):
    ids = torch.tensor(rows)[:, None].expand(-1, 3)
    assert share_repeated(repeats, [ids, None], []).copies == copies
    assert share_repeated(repeats, [torch.zeros(len(rows), 2)], [None, ids]).copies == copies


def test_what_is_not_a_number_equals_nothing():
    assert share_repeated(2, [torch.zeros(2, 1)], [torch.full((2, 1), torch.nan)]).copies == 1


def test_equal_samples_are_held_apart_and_their_return_sequences_together():
    """Equal inputs do not prove equal rows: a model may add something to each row."""
    model, inputs = mllama(torch.float64), one()
    twice = {key: value.repeat(2, *[1] * (value.ndim - 1)) for key, value in inputs.items()}
    with kvprune.compress(model, "norm:keep_ratio=0.5") as alone:
        assert generate(model, inputs)[2].layers[1].keys.shape[0] == 1
    with kvprune.compress(model, "norm:keep_ratio=0.5") as together:
        cache = generate(model, twice, num_beams=3)[2]
    assert cache.layers[1].keys.shape[0] == 2
    assert cache.layers[1].copies == 3
    assert together.report.bytes_held == 2 * alone.report.bytes_held
    assert difference_to_oracle(model, twice, "norm:keep_ratio=0.5", num_beams=3) <= 1e-6


def test_rows_are_not_shared_in_training_mode():
    """Dropout makes them differ."""
    model = mllama(torch.float64).train()
    with kvprune.compress(model, "norm"):
        cache = generate(model, one(), num_beams=2)[2]
    assert cache.layers[1].copies == 1


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
