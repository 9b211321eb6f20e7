"""`answer-attention` keeps what its guidance ranks highest, by one ranking for all layers and heads."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from generation import bart, generate, mllama, whisper
from helpers import conversations, exact_budget, kept_sets, make_view, slow_groups, slow_strata
from hypothesis import given
from hypothesis import strategies as st
from kvprune_strategies import AnswerAttention

import kvprune
from kvprune.errors import BudgetError, PolicyOptionError
from kvprune.session.answer_guide import answer_attention
from kvprune.testing import masked_oracle, mllama_inputs
from kvprune.testing.reference import slow_decode, slow_prefill

ratios = st.integers(1, 1000).map(lambda thousandths: thousandths / 1000)


def view_of(visibility, seed=0, ties=False, rank=0):
    random = torch.Generator().manual_seed(seed)
    guidance = torch.rand(visibility.batch, visibility.columns, generator=random)
    if ties:
        guidance = (guidance * 3).floor()
    return make_view(visibility, rank=rank, captured_guidance=guidance, captured_queries=None)


def slow_choice(view, sample, ratio, stratum):
    """Best of each visibility group first, then by attention; ties by position."""
    scores = view.guidance[sample].tolist()
    best = [min(group, key=lambda c: (-scores[c], c)) for group in slow_groups(view.visibility, sample)]
    first = [column for column in best if column in stratum]
    order = sorted(stratum, key=lambda c: (c not in first, -scores[c], c))
    return set(order[: max(exact_budget(ratio, len(stratum)), len(first))])


@given(conversations(), ratios, st.booleans(), st.integers(0, 99))
def test_the_first_layer_decides_for_all(visibility, ratio, ties, seed):
    view = view_of(visibility, seed, ties)
    decision = AnswerAttention(keep_ratio=ratio).select(view)
    for sample, (kept,) in enumerate(kept_sets(decision.onward)):
        if slow_prefill(visibility, sample):
            strata = slow_strata(visibility, sample)
            assert kept == set().union(*(slow_choice(view, sample, ratio, one) for one in strata))
    later = dataclasses.replace(view, rank=1)
    assert AnswerAttention(keep_ratio=ratio).select(later) == kvprune.Decision()


@given(conversations(), ratios, st.integers(0, 2), st.integers(0, 99))
def test_each_layer_prunes_its_own_cache_by_the_same_ranking(visibility, ratio, rank, seed):
    view = view_of(visibility, seed, rank=rank)
    decision = AnswerAttention(keep_ratio=ratio, reach="layer").select(view)
    assert decision.onward is None
    for sample, (kept,) in enumerate(kept_sets(decision.cache)):
        visible = slow_decode(visibility, sample)
        if visible:
            assert kept == slow_choice(view, sample, ratio, visible)


@given(conversations())
def test_a_sample_keeps_alone_what_it_keeps_in_a_batch(visibility):
    view, policy = view_of(visibility), AnswerAttention(keep_ratio=0.3)
    together = kept_sets(policy.select(view).onward)
    see = visibility
    for sample in range(see.batch):
        one = slice(sample, sample + 1)
        alone = dataclasses.replace(
            view.capturing(guidance=view.guidance[one], raw_keys=None, features=None),
            keys=view.keys[one],
            values=view.values[one],
            visibility=dataclasses.replace(
                see, rows=see.rows[one], live=see.live[one], units=see.units.expand(see.batch, -1)[one]
            ),
        )
        assert kept_sets(policy.select(alone).onward)[0] == together[sample]


@pytest.mark.parametrize("reach", ["onward", "layer"])
@pytest.mark.parametrize("family", [mllama, bart, whisper])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_generation_equals_the_oracle(family, reach, options):
    model = family()
    if family is mllama:
        inputs = mllama_inputs(["tt4tt1tt", "t2tt"])
    elif family is bart:
        inputs = {"input_ids": torch.randint(4, 60, (2, 9)), "attention_mask": torch.ones(2, 9).long()}
        inputs["attention_mask"][1, 6:] = 0
    else:
        inputs = {"input_features": torch.randn(2, 8, 100)}
    answer = torch.tensor([[5, 6, 7], [8, 9, 0]])
    guidance = answer_attention(model, inputs, answer, answer > 0)
    policy = f"answer-attention:keep_ratio=0.3,reach={reach}"
    with kvprune.compress(model, policy, guide=guidance) as run:
        sequences, logits, _ = generate(model, inputs, **options)
    with masked_oracle(model, run.selections, run.prefill_selections):
        expected, oracle, _ = generate(model, inputs, **options)
    assert torch.equal(sequences, expected)
    assert (logits - oracle).abs().max() <= 1e-5


def test_options():
    assert AnswerAttention().reach == "onward"
    assert AnswerAttention().exact_budget == kvprune.Budget(keep_ratio=0.5)
    assert AnswerAttention(keep_tokens=3).exact_budget == kvprune.Budget(keep_tokens=3)
    assert AnswerAttention().needs == {"guidance"}
    assert AnswerAttention.reads_answer
    assert str(AnswerAttention().spec) == "answer-attention:keep_ratio=0.5"
    with pytest.raises(PolicyOptionError, match=r"reach.*'far'"):
        kvprune.get_policy("answer-attention:reach=far")
    with pytest.raises(BudgetError, match="got 0"):
        AnswerAttention(keep_ratio=0.0)


def test_it_is_the_only_built_in_policy_that_reads_the_answer():
    classes = [type(kvprune.get_policy(name)) for name in kvprune.list_policies()]
    assert [cls.name for cls in classes if cls.reads_answer] == ["answer-attention"]
