"""What a policy may look at of the text, against plain loops."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import make_view, make_visibility
from hypothesis import given, settings
from hypothesis import strategies as st
from text_views import make_text, slow_row

from kvprune.errors import PolicyOptionError, ScoreError, UnsupportedModelError
from kvprune.policy.text_view import TextView
from kvprune.testing.cost import peak_memory
from kvprune.testing.cutting import cut_to_sample
from kvprune.testing.problems import LayerProblem

texts = st.builds(
    make_text,
    st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple),
    st.sampled_from([0, 4]),
    seed=st.integers(0, 99),
)


@settings(deadline=None, max_examples=40)
@given(texts, st.data())
def test_attention_of_rows(text, data):
    rows = torch.tensor(
        data.draw(
            st.lists(
                st.lists(st.integers(0, text.rows - 1), min_size=2, max_size=2),
                min_size=text.batch,
                max_size=text.batch,
            )
        )
    )
    weights = text.attention_of(rows)
    for sample in range(text.batch):
        for head in range(4):
            for number, row in enumerate(rows[sample].tolist()):
                expected = torch.tensor(slow_row(text, sample, head, row))
                assert torch.allclose(weights[sample, head, number], expected.double(), atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(texts, st.sampled_from([0.0, 1.0, 2.5]), st.booleans())
def test_attention_mass_of_rows(text, null_keys, some):
    chosen = torch.rand(text.batch, text.rows) < 0.6 if some else None
    mass = text.attention_mass(chosen, null_keys=null_keys)
    for sample in range(text.batch):
        for head in range(4):
            rows = [row for row in range(text.rows) if chosen is None or chosen[sample, row]]
            expected = torch.zeros(text.entries, dtype=torch.float64)
            for row in rows:
                expected += torch.tensor(slow_row(text, sample, head, row, null_keys), dtype=torch.float64)
            assert torch.allclose(mass[sample, head], expected, atol=1e-9)


def test_mass_does_not_depend_on_chunks(monkeypatch):
    text = make_text((70, 130))
    whole = text.attention_mass()
    monkeypatch.setattr("kvprune.scoring.attention._ROWS_PER_CHUNK", 7)
    monkeypatch.setattr("kvprune.scoring.attention._ELEMENTS_PER_CHUNK", 1)
    assert torch.allclose(text.attention_mass(), whole, atol=1e-9)
    assert torch.allclose(whole.sum(-1), torch.tensor([[70.0], [130.0]], dtype=torch.float64), atol=1e-9)


def test_large_logits_do_not_overflow_the_null_key():
    text = make_text()
    high = dataclasses.replace(text, keys=text.keys * 1e3)
    assert high.attention_mass(null_keys=1.0).isfinite().all()
    low = dataclasses.replace(
        text, queries=torch.ones_like(text.queries), keys=-torch.ones_like(text.keys) * 1e3
    )
    assert low.attention_mass(null_keys=1.0).sum() == 0  # all of it goes to the null key


def test_a_sample_alone_gets_bit_for_bit_what_it_gets_in_a_batch():
    text = make_text((3, 5), dtype=torch.float32)
    one = slice(0, 1)
    alone = dataclasses.replace(
        text,
        queries=text.queries[one, :, 2:],
        keys=text.keys[one, :, 2:],
        values=text.values[one, :, 2:],
        real=text.real[one, 2:],
    )
    assert torch.equal(text.attention_mass()[0, :, 2:], alone.attention_mass()[0])
    together = text.attention_of(text.last_row[:, None])
    assert torch.equal(together[0, :, :, 2:], alone.attention_of(alone.last_row[:, None])[0])


def test_last_row_and_real_rows():
    text = make_text((3, 5), earlier=4)
    assert text.real_rows.tolist() == [[False, False, True, True, True], [True] * 5]
    assert text.last_row.tolist() == [4, 4]
    padded = dataclasses.replace(text, real=text.real.flip(1))
    assert padded.last_row.tolist() == [3, 2]  # padding on the right


def test_attention_that_is_not_finite_is_refused():
    text = make_text()
    broken = dataclasses.replace(text, keys=text.keys * float("nan"))
    with pytest.raises(ScoreError, match=r"policy 'test' at the self-attention of layer 2: attention is NaN"):
        broken.attention_mass()
    with pytest.raises(ScoreError, match="not finite"):
        broken.attention_of(broken.last_row[:, None])


def test_a_view_shows_text_only_to_who_declares_it():
    see, text = make_visibility([[[1]]], 3), make_text((1,))
    assert make_view(see, captured_text=text).text is text
    with pytest.raises(PolicyOptionError, match=r'needs = frozenset\(\{"text"\}\)'):
        make_view(see).text  # noqa: B018
    with pytest.raises(UnsupportedModelError, match=r"layer 0, but .* first of the decoder"):
        make_view(see, follows_text=False, layer_idx=0).text  # noqa: B018


def test_problems_have_text():
    problem = LayerProblem(layouts=("tt4ttt", "1t"))
    view = problem.view()
    assert view.text.real.sum(-1).tolist() == [6, 2]
    cut = cut_to_sample(view, problem, 1)
    assert cut.text.real.tolist() == [[True, True]]
    assert torch.equal(cut.text.keys[0], view.text.keys[1, :, 4:])
    assert torch.equal(cut.text.queries[0], view.text.queries[1, :, 4:])


def test_long_texts_need_little_memory():
    """32 query heads, 8 KV heads and 2048 tokens at 11B dimensions: all weights at once would be 512 MiB."""
    random = torch.Generator().manual_seed(0)
    tokens = 2048
    queries = torch.randn(1, 32, tokens, 128, generator=random)
    keys = torch.randn(1, 8, tokens, 128, generator=random)
    real = torch.ones(1, tokens, dtype=torch.bool)
    text = TextView(queries=queries, keys=keys, values=keys, real=real, scaling=128**-0.5)
    window = torch.arange(tokens)[None] >= tokens - 64
    assert peak_memory(lambda: text.attention_mass(window)) <= 64 * 2**20
    assert peak_memory(lambda: text.attention_of(text.last_row[:, None])) <= 64 * 2**20
    assert peak_memory(lambda: text.attention_mass(torch.arange(tokens)[None] < 256)) <= 64 * 2**20
