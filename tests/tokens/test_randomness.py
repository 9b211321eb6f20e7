"""Randomness that depends on the seed, the layer and the sample's content, and on nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvprune.tokens import randomness

seeds = st.integers(-(2**40), 2**40)
fingerprint_lists = st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=4)


def images(batch=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, 3, 14, 14, generator=generator).to(dtype)


@given(
    seeds, st.integers(0, 20), fingerprint_lists, st.integers(1, 4), st.integers(1, 40), st.integers(0, 40)
)
def test_more_columns_change_nothing_before_them(seed, rank, values, heads, columns, more):
    prints = torch.tensor(values)
    short = randomness.uniform(seed, rank, prints, heads, columns)
    long = randomness.uniform(seed, rank, prints, heads, columns + more)
    assert short.shape == (len(values), heads, columns)
    assert torch.equal(short, long[..., :columns])


@given(seeds, st.integers(0, 20), fingerprint_lists)
def test_a_sample_draws_alone_what_it_draws_in_a_batch(seed, rank, values):
    batch = randomness.uniform(seed, rank, torch.tensor(values), 2, 11)
    backwards = randomness.uniform(seed, rank, torch.tensor(values[::-1]), 2, 11)
    assert torch.equal(batch, backwards.flip(0))
    for place, value in enumerate(values):
        assert torch.equal(batch[place], randomness.uniform(seed, rank, torch.tensor([value]), 2, 11)[0])


def test_draws_are_float32_from_zero_to_one_and_spread_out():
    drawn = randomness.uniform(0, 0, torch.tensor([1, 2]), 3, 500)
    assert drawn.dtype == torch.float32
    assert drawn.device.type == "cpu"
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) < 1
    assert abs(float(drawn.mean()) - 0.5) < 0.03
    assert len(drawn.unique()) > 2990


@pytest.mark.parametrize("other", [(1, 0, 5), (0, 1, 5), (0, 0, 6), (0, 5, 0)], ids=str)
def test_seed_layer_and_content_each_change_the_draw(other):
    reference = randomness.uniform(0, 0, torch.tensor([5]), 1, 8)
    seed, rank, value = other
    assert not torch.equal(reference, randomness.uniform(seed, rank, torch.tensor([value]), 1, 8))


def test_neighbouring_seeds_and_layers_are_unrelated():
    # seed 1 at layer 0 must not repeat seed 0 at layer 1, as adding them up would.
    draws = {
        tuple(torch.rand(4, generator=randomness.generator(seed, rank)).tolist())
        for seed in range(20)
        for rank in range(20)
    }
    assert len(draws) == 400
    content = torch.tensor([5])
    draws = {
        tuple(randomness.uniform(seed, rank, content, 1, 4).flatten().tolist())
        for seed in range(5)
        for rank in range(5)
    }
    assert len(draws) == 25


def test_digits_of_neighbouring_parts_do_not_run_together():
    first, second = randomness.generator(1, 23), randomness.generator(12, 3)
    assert first.initial_seed() != second.initial_seed()


def test_the_global_random_state_is_neither_used_nor_moved():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = randomness.uniform(7, 1, torch.tensor([9]), 1, 6)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    assert torch.equal(first, randomness.uniform(7, 1, torch.tensor([9]), 1, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_fingerprint_of_a_sample_ignores_its_batch(dtype):
    pixels = images(4, dtype=dtype)
    together = randomness.fingerprint(pixels)
    assert together.dtype == torch.int64
    assert together.shape == (4,)
    for split in (1, 2, 3):
        assert torch.equal(
            together, torch.cat([randomness.fingerprint(part) for part in pixels.split(split)])
        )
    assert torch.equal(together.flip(0), randomness.fingerprint(pixels.flip(0)))


@pytest.mark.parametrize("extra", [1, 2, 5])
def test_images_that_only_other_samples_have_do_not_change_a_fingerprint(extra):
    pixels = images()
    padded = torch.cat([pixels, torch.zeros(3, extra, 3, 14, 14)], dim=1)
    assert torch.equal(randomness.fingerprint(pixels), randomness.fingerprint(padded))


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=20), st.integers(0, 10))
def test_zeros_after_token_ids_do_not_change_a_fingerprint(ids, zeros):
    tokens = torch.tensor([ids])
    padded = torch.tensor([ids + [0] * zeros])
    assert torch.equal(randomness.fingerprint(tokens), randomness.fingerprint(padded))


@given(st.lists(st.integers(1, 5000), min_size=2, max_size=20), st.data())
def test_another_token_or_another_order_is_another_fingerprint(ids, data):
    place = data.draw(st.integers(0, len(ids) - 1))
    changed = list(ids)
    changed[place] += 1
    assert not torch.equal(
        randomness.fingerprint(torch.tensor([ids])), randomness.fingerprint(torch.tensor([changed]))
    )
    swapped = [*ids[1:], ids[0]]
    if swapped != ids:
        first, second = (randomness.fingerprint(torch.tensor([value])) for value in (ids, swapped))
        assert not torch.equal(first, second)


def test_different_pictures_have_different_fingerprints():
    assert len(randomness.fingerprint(images(64)).unique()) == 64


def test_a_fingerprint_does_not_depend_on_memory_layout():
    pixels = images()
    strided = pixels.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert not strided.is_contiguous()
    assert torch.equal(randomness.fingerprint(pixels), randomness.fingerprint(strided))


def states(batch=4, columns=50, width=16, seed=0):
    return torch.randn(
        batch, columns, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def seen(*lengths, columns=50):
    return torch.arange(columns) < torch.tensor(lengths)[:, None]


def test_states_of_other_samples_have_other_digests():
    digests = randomness.states_fingerprint(states(100), seen(*[50] * 100))
    assert digests.unique().numel() >= 99  # six projections, about 200 steps each


def test_states_of_a_sample_have_one_digest_alone_in_a_batch_and_in_any_dtype_but_the_shortest():
    every, lengths = states(), seen(50, 20, 7, 1)
    together = randomness.states_fingerprint(every, lengths)
    for row, length in enumerate((50, 20, 7, 1)):
        alone = randomness.states_fingerprint(every[row : row + 1, :length], seen(length, columns=length))
        assert alone == together[row]
    assert torch.equal(randomness.states_fingerprint(every.float(), lengths), together)


def test_rounding_hardly_ever_changes_the_digest_of_states():
    every, lengths = states(200), seen(*[50] * 200)
    noise = 1e-6 * torch.randn(every.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    changed = randomness.states_fingerprint(every, lengths) != randomness.states_fingerprint(
        every + noise, lengths
    )
    assert changed.sum() <= 1


def test_what_padding_holds_and_samples_of_nothing_else_are_no_trouble():
    every, lengths = states(2), seen(20, 0)
    before = randomness.states_fingerprint(every, lengths)
    every[:, 20:] = torch.nan
    assert torch.equal(randomness.states_fingerprint(every, lengths), before)
    assert before[1] == 0
