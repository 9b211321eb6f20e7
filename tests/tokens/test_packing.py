"""Packing a mask to the left lists its true entries in order and pads with the last one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvprune.tokens.packing import pack_left

rows = st.integers(1, 8).flatmap(
    lambda columns: st.lists(
        st.lists(st.booleans(), min_size=columns, max_size=columns), min_size=1, max_size=4
    )
)


@given(rows, st.booleans())
def test_true_entries_come_first_and_the_last_one_pads(flags, told):
    width = max(sum(row) for row in flags)
    indices, valid = pack_left(torch.tensor(flags)[None], width if told else None)
    assert indices.shape == valid.shape == (1, len(flags), width)
    for row, found, real in zip(flags, indices[0].tolist(), valid[0].tolist(), strict=True):
        columns = [column for column, flag in enumerate(row) if flag]
        assert real == [True] * len(columns) + [False] * (width - len(columns))
        assert found[: len(columns)] == columns
        if columns:
            assert set(found[len(columns) :]) <= {columns[-1]}


@pytest.mark.parametrize("shape", [(2, 3), (1, 2, 3), (2, 1, 2, 3)])
def test_nothing_true_gives_no_entries(shape):
    indices, valid = pack_left(torch.zeros(shape, dtype=torch.bool))
    assert indices.shape == valid.shape == (*shape[:-1], 0)
