"""Quantized vectors against plain loops, the bound that is promised, packing, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprune.cache.pools import Pool
from kvprune.cache.quantization import QUANTIZED_BITS, group_width, pack, quantize, unpack
from kvprune.errors import QuantizationError

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
bits = st.sampled_from(QUANTIZED_BITS)
dtypes = st.sampled_from(DTYPES)
few = settings(max_examples=60, deadline=None)


def slow_group(width: int) -> int:
    best = max(size for size in range(1, 65) if width % size == 0)
    return best if best >= 16 else width


def slow(vector: list[float], width: int) -> tuple[list[float], list[float]]:
    """Levels and steps of each number, with Python's floats."""
    levels, steps = [], []
    size = slow_group(len(vector))
    for first in range(0, len(vector), size):
        group = vector[first : first + size]
        low, high = min(group), max(group)
        step = (high - low) / (2**width - 1)
        for number in group:
            levels.append(low + (round((number - low) / step) if step else 0) * step)
            steps.append(step)
    return levels, steps


def vectors(numbers: st.SearchStrategy[float]) -> st.SearchStrategy[list[float]]:
    return st.sampled_from([1, 2, 3, 8, 67, 80, 128]).flatmap(
        lambda width: st.lists(numbers, min_size=width, max_size=width)
    )


ordinary = st.floats(-100, 100, width=16)
# Subnormal numbers of every dtype, and ones near the largest of float16.
extreme = st.one_of(ordinary, st.sampled_from([0.0, -0.0, 6e-8, -6e-8, 65504.0, -65504.0, 1e-4, 32.03]))


@few
@given(vectors(extreme), bits, dtypes)
def test_each_number_becomes_the_nearest_level_as_loops_find_it(numbers, width, dtype):
    exact = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    before = exact.clone()
    made = quantize(exact, width)
    assert torch.equal(exact, before)  # not written to
    found = made.dequantize()
    assert found.dtype == dtype
    assert found.shape == exact.shape
    levels, steps = slow(exact.double().tolist(), width)
    # Of the level in its dtype, and of the arithmetic that makes it from the ends.
    slack = torch.finfo(dtype).eps * 2 * max(abs(number) for number in exact.double().tolist())
    slack += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for number, level, wanted, step in zip(
        exact.double().tolist(), found.double().tolist(), levels, steps, strict=True
    ):
        assert abs(level - wanted) <= slack
        assert abs(level - number) <= step / 2 + slack


@few
@given(vectors(ordinary), dtypes)
def test_the_ends_of_a_group_stay_as_they_are(numbers, dtype):
    exact = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    found = quantize(exact, 8).dequantize()
    size = slow_group(len(numbers))
    for group, now in zip(exact.split(size), found.split(size), strict=True):
        assert now[group.argmin()] == group.min()
        assert torch.allclose(now[group.argmax()].double(), group.max().double(), rtol=1e-6, atol=0)


@few
@given(ordinary, bits, dtypes)
def test_constants_are_exact(number, width, dtype):
    exact = torch.full((2, 3, 8), number, dtype=torch.float64).to(dtype)
    assert torch.equal(quantize(exact, width).dequantize(), exact)


@few
@given(st.lists(st.integers(0, 255), min_size=1, max_size=40), bits)
def test_packing_round_trips_and_takes_as_many_bytes_as_it_must(numbers, width):
    codes = torch.tensor([numbers, numbers[::-1]], dtype=torch.uint8) & (2**width - 1)
    packed = pack(codes, width)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, math.ceil(len(numbers) * width / 8))
    assert torch.equal(unpack(packed, width, len(numbers)), codes)


def test_the_first_code_lies_in_the_lowest_bits():
    assert pack(torch.tensor([1, 2, 3, 0, 2], dtype=torch.uint8), 2).tolist() == [0b00111001, 0b10]
    assert pack(torch.tensor([1, 2, 15], dtype=torch.uint8), 4).tolist() == [0x21, 0x0F]


@pytest.mark.parametrize("width", range(1, 300))
def test_groups_divide_vectors_into_at_most_64_channels_where_that_is_worth_it(width):
    assert group_width(width) == slow_group(width)
    assert width % group_width(width) == 0


def test_no_vector_depends_on_another():
    tensor = torch.randn(2, 3, 5, 80, generator=torch.Generator().manual_seed(0))
    for width in QUANTIZED_BITS:
        whole = quantize(tensor, width).dequantize()
        assert torch.equal(whole[1:, 2:, 3:4], quantize(tensor[1:, 2:, 3:4], width).dequantize())


@pytest.mark.parametrize(
    ("dtype", "width", "share"),
    [(torch.bfloat16, 8, 17 / 32), (torch.bfloat16, 4, 9 / 32), (torch.float16, 2, 5 / 32)],
)
def test_what_128_channels_in_16_bits_become(dtype, width, share):
    tensor = torch.randn(4, 128).to(dtype)
    assert quantize(tensor, width).nbytes == share * tensor.nbytes  # codes, and two ends of 2 groups


@pytest.mark.parametrize("wrong", [16, 3, 0, 1, "4", None])
def test_other_bits_are_refused(wrong):
    with pytest.raises(QuantizationError, match=r"to 8, 4 or 2 bits, got"):
        quantize(torch.ones(4), wrong)


@pytest.mark.parametrize(
    "bad", [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, 1.0], [3e38, -3e38], [math.nan, math.nan]]
)
def test_what_has_no_levels_is_refused_with_its_range(bad):
    with pytest.raises(QuantizationError, match=r"from .* to .* \(torch.float32\) cannot be quantized"):
        quantize(torch.tensor([[0.0, 0.0], bad]), 4)


@pytest.mark.parametrize("bad", [torch.ones(4, dtype=torch.int64), torch.ones(4, 0)])
def test_what_is_no_vector_of_numbers_is_refused(bad):
    with pytest.raises(QuantizationError, match=r"vectors \[\.\.\., D\] of a floating-point dtype"):
        quantize(bad, 4)


@pytest.mark.parametrize("entries", [3, 1500])  # the latter in several chunks
def test_a_pool_holds_the_chosen_entries_of_each_head(entries):
    generator = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(2, 2, entries, 128, generator=generator) for _ in range(2))
    for heads in (1, 2):
        index = torch.randint(0, entries, (2, heads, entries), generator=generator)
        pool = Pool.of(keys, values, index, 4)
        assert (pool.bits, pool.width, pool.nbytes) == (4, entries, 2 * 2 * 2 * entries * (64 + 16))
        for side, found in zip((keys, values), pool.dequantize(), strict=True):
            chosen = side.gather(2, index[..., None].expand(-1, 2, -1, 128))
            assert torch.equal(found, quantize(chosen, 4).dequantize())
        joined = Pool.cat([pool, pool.at(index[..., :2])])
        assert joined.width == entries + 2
        assert torch.equal(joined.dequantize()[0][:, :, :entries], pool.dequantize()[0])
