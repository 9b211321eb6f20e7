"""Softmax weights in chunks, against `torch.softmax` of all logits at once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvprune.policy.text_view import TextView
from kvprune.scoring.attention import attention_logits, logit_chunks, softmax_


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("null_keys", [0, 1.0, 2.5])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_null_keys_are_more_columns_of_logit_zero(null_keys, scale):
    logits = drawn(3, 4, 7) * scale
    logits[..., 2] = -torch.inf
    extra = torch.zeros(3, 4, 2, dtype=torch.float64)
    extra[..., 0] = torch.tensor(null_keys).log()  # so many keys of logit 0 weigh as much as one of their log
    extra[..., 1] = -torch.inf
    expected = torch.softmax(torch.cat([logits, extra], -1), -1)[..., :7]
    written = logits.clone()
    weights = softmax_(written, null_keys)
    assert weights is written
    torch.testing.assert_close(weights, expected)
    assert not weights[..., 2].any()


@pytest.mark.parametrize(
    ("dtype", "scored_in"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]
)
def test_logits_are_new_and_in_the_dtype_of_scores(dtype, scored_in):
    queries, keys = drawn(2, 3, 5, 4, dtype=dtype), drawn(2, 6, 4, seed=1, dtype=dtype)
    before = queries.clone()
    logits = attention_logits(queries, keys, 0.3)
    expected = torch.einsum("hgtd,hsd->hgts", queries.to(scored_in), keys.to(scored_in)) * 0.3
    torch.testing.assert_close(logits, expected)
    assert logits.dtype == scored_in
    logits.zero_()
    assert torch.equal(queries, before)


@given(st.integers(1, 3), st.integers(1, 3), st.lists(st.integers(0, 8), min_size=1, unique=True))
def test_chunks_cover_each_head_and_row_once(kv_heads, group, chosen):
    queries, keys, rows = drawn(kv_heads * group, 9, 4), drawn(kv_heads, 6, 4, seed=1), torch.tensor(chosen)
    sees = torch.arange(6) <= torch.arange(9)[:, None]
    whole = attention_logits(queries.unflatten(0, (kv_heads, group)), keys, 0.3).flatten(0, 1)
    whole = whole.masked_fill(~sees, -torch.inf)
    for rows_per_chunk, elements in ((64, 2**21), (2, 1), (1, 40)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("kvprune.scoring.attention._ROWS_PER_CHUNK", rows_per_chunk)
            patch.setattr("kvprune.scoring.attention._ELEMENTS_PER_CHUNK", elements)
            found = torch.zeros(kv_heads * group, dtype=torch.int64)
            parts = [[] for _ in found]
            for heads, logits, seen in logit_chunks(queries, keys, rows, 0.3, lambda some: sees[some]):
                assert seen.shape == logits.shape[1:]
                for head, part in zip(range(*heads.indices(len(found))), logits, strict=True):
                    parts[head].append(part)
        torch.testing.assert_close(torch.stack([torch.cat(part) for part in parts]), whole[:, rows])


@given(st.integers(1, 70), st.integers(0, 5), st.sampled_from([0.0, 1.5]), st.integers(0, 9))
def test_text_attention_is_the_same_to_the_last_bit(text_rows, earlier, null_keys, seed):
    entries = text_rows + earlier
    text = TextView(
        queries=drawn(1, 4, text_rows, 8, seed=seed, dtype=torch.float32),
        keys=drawn(1, 2, entries, 8, seed=seed + 1, dtype=torch.float32),
        values=drawn(1, 2, entries, 8, dtype=torch.float32),
        real=torch.ones(1, entries, dtype=torch.bool),
        scaling=0.3,
    )

    def sees(rows):
        return torch.arange(entries) <= rows[:, None] + earlier

    mass = torch.zeros(4, entries)
    rows = torch.arange(text_rows)
    for heads, logits, _ in logit_chunks(text.queries[0], text.keys[0], rows, text.scaling, sees):
        mass[heads] += softmax_(logits, null_keys).sum(1)
    assert torch.equal(text.attention_mass(null_keys=null_keys)[0], mass)
