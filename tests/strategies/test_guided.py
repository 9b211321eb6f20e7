"""`guided` keeps what its guide attends to most, from its first layer on, exactly as many as it says."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from generation import bart, difference_to_oracle, generate, mllama, whisper
from guidance import Watched, live_rows_of, slow_sum, small
from helpers import (
    conversations,
    exact_budget,
    kept_sets,
    make_view,
    make_visibility,
    slow_groups,
    slow_strata,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from kvprune_strategies import Guided

import kvprune
import kvprune.testing
from kvprune import FeatureView
from kvprune.errors import BudgetError, PolicyOptionError
from kvprune.testing import masked_oracle, mllama_inputs
from kvprune.testing.reference import slow_prefill

ratios = st.integers(1, 1000).map(lambda thousandths: thousandths / 1000)


def guided_views(visibility, seed=0, ties=False, rank=0):
    """The view before the first layer, and one of a layer, with random guidance."""
    random = torch.Generator().manual_seed(seed)
    guidance = torch.rand(visibility.batch, visibility.columns, generator=random)
    if ties:
        guidance = (guidance * 3).floor()
    view = make_view(visibility, rank=rank, captured_guidance=guidance)
    fields = {field.name: getattr(view, field.name) for field in dataclasses.fields(FeatureView)}
    return FeatureView(**fields), view


def slow_choice(view, sample, ratio):
    """Best of each visibility group first, then by importance; ties by position. Each stratum by itself."""
    importance = view.guidance[sample].tolist()
    best = [min(group, key=lambda c: (-importance[c], c)) for group in slow_groups(view.visibility, sample)]
    kept = set()
    for stratum in slow_strata(view.visibility, sample):
        first = [column for column in best if column in stratum]
        order = sorted(stratum, key=lambda c: (c not in first, -importance[c], c))
        kept |= set(order[: max(exact_budget(ratio, len(stratum)), len(first))])
    return kept


@given(conversations(), ratios, st.booleans(), st.integers(0, 99))
def test_the_most_important_tokens_stay(visibility, ratio, ties, seed):
    before, layer = guided_views(visibility, seed, ties)
    for decision in (
        Guided(keep_ratio=ratio).choose(before),
        Guided(keep_ratio=ratio, start=1).select(layer),
    ):
        assert decision.cache is None
        for sample, (kept,) in enumerate(kept_sets(decision.onward)):
            if slow_prefill(visibility, sample):
                assert kept == slow_choice(before, sample, ratio)


@given(conversations(), st.integers(0, 4), st.integers(0, 2))
def test_only_one_moment_decides(visibility, start, rank):
    before, layer = guided_views(visibility, rank=rank)
    policy = Guided(start=start)
    assert (policy.choose(before).onward is not None) == (start == 0)
    assert (policy.select(layer).onward is not None) == (rank == start - 1)


@given(conversations())
def test_a_sample_keeps_alone_what_it_keeps_in_a_batch(visibility):
    before, _ = guided_views(visibility)
    together = kept_sets(Guided(keep_ratio=0.3).choose(before).onward)
    see = visibility
    for sample in range(see.batch):
        one = slice(sample, sample + 1)
        alone = dataclasses.replace(
            before.capturing(guidance=before.guidance[one], features=None),
            visibility=dataclasses.replace(
                see, rows=see.rows[one], live=see.live[one], units=see.units.expand(see.batch, -1)[one]
            ),
        )
        assert kept_sets(Guided(keep_ratio=0.3).choose(alone).onward)[0] == together[sample]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("start", [0, 1, 2])
def test_the_model_keeps_what_the_stock_guide_attends_to_most(own, start):
    """From the weights that a stock guide returns to the columns that decoding holds."""
    inputs, ratio = mllama_inputs(["tt4ttt", "t1tt", "4t"]), 0.3
    model = mllama(torch.float32, "eager")
    guide = model if own else small("eager")
    with Watched(guide) as watched, torch.no_grad():
        guide(**inputs)
    importance = slow_sum(watched.calls[0], live_rows_of(inputs))
    policy = kvprune.get_policy(f"guided:keep_ratio={ratio},start={start}")
    with kvprune.compress(model, policy, guide=None if own else guide) as run:
        generate(model, inputs)
    for rank, layer_idx in enumerate((1, 3, 5)):
        kept = kept_sets(run.selections[layer_idx])
        for sample, seen in enumerate((20, 5, 20)):
            order = sorted(range(seen), key=lambda c: (-importance[sample][c], c))
            count = seen if rank < start else exact_budget(ratio, seen)
            assert kept[sample][0] == set(order[:count])
        early = run.prefill_selections[layer_idx]
        assert (early is None) == (rank < start)
    assert run.report.to_dict()["requested"] == {"keep_ratio": ratio} | ({"start": start} if start else {})
    retention = start / 3 + (1 - start / 3) * ratio
    assert run.report.kept_fraction == pytest.approx(retention, abs=0.05)
    exact = [(start + (3 - start) * exact_budget(ratio, seen) / seen) / 3 for seen in (20, 5, 20)]
    assert run.report.kept_per_sample == pytest.approx(exact)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
@pytest.mark.parametrize("spec", ["guided:keep_ratio=0.3", "guided:keep_tokens=3,start=2"])
@pytest.mark.parametrize(
    "layouts", [["tt4ttt", "t1tt", "tt2tttt"], ["tt4tt1tt", "t2tt", "14ttt"], ["tt4tt", "tttt", "2ttt"]]
)
def test_generation_equals_the_oracle(layouts, spec, options):
    inputs = mllama_inputs(layouts)
    assert difference_to_oracle(mllama(), inputs, spec, **options) <= 1e-5
    with kvprune.compress(mllama(), spec, guide=kvprune.Guide(small(), max_new_tokens=3)) as run:
        sequences, logits, _ = generate(mllama(), inputs, **options)
    with masked_oracle(mllama(), run.selections, run.prefill_selections):
        expected, oracle, _ = generate(mllama(), inputs, **options)
    assert torch.equal(sequences, expected)
    assert (logits - oracle).abs().max() <= 1e-5


@pytest.mark.parametrize("family", [bart, whisper])
@pytest.mark.parametrize("start", [0, 1])
def test_encoder_decoder_generation_equals_the_oracle(family, start):
    model = family()
    if family is bart:
        inputs = {"input_ids": torch.randint(4, 60, (2, 9)), "attention_mask": torch.ones(2, 9).long()}
        inputs["attention_mask"][1, 6:] = 0
    else:
        inputs = {"input_features": torch.randn(2, 8, 100)}
    spec = f"guided:keep_ratio=0.3,start={start}"
    assert difference_to_oracle(model, inputs, spec) <= 1e-5
    assert difference_to_oracle(model, inputs, spec, num_beams=2) <= 1e-5


@pytest.mark.parametrize("spec", ["guided:keep_ratio=1", "guided:keep_ratio=0.1,start=3", "guided:start=99"])
@pytest.mark.parametrize("own", [True, False])
def test_all_tokens_or_all_layers_is_the_identity(spec, own):
    inputs = mllama_inputs(["4ttt", "4tt"])
    expected = generate(mllama(), inputs)
    with kvprune.compress(mllama(), spec, guide=None if own else small()) as run:
        found = generate(mllama(), inputs)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert run.report.kept_fraction == 1.0


@given(ratios, st.integers(0, 3))
@settings(deadline=None, max_examples=10)
def test_what_is_dropped_is_projected_by_no_later_layer(ratio, start):
    inputs, widths = mllama_inputs(["4tt"]), {}
    text, handles = mllama().model.language_model, []
    with kvprune.compress(mllama(), Guided(keep_ratio=ratio, start=start), guide=small()):
        for index in (1, 3, 5):

            def note(module, args, output, index=index):
                widths.setdefault(index, output.shape[1])

            handles.append(text.layers[index].cross_attn.k_proj.register_forward_hook(note))
        try:
            generate(mllama(), inputs, steps=2)
        finally:
            for handle in handles:
                handle.remove()
    kept = exact_budget(ratio, 20)
    assert widths == {index: 20 if rank < start else kept for rank, index in enumerate((1, 3, 5))}


@pytest.mark.parametrize(("layers", "whole"), [(8, 2), (3, 0), (4, 1)])
def test_a_fraction_of_the_layers_is_rounded_down(layers, whole):
    before, layer = guided_views(make_visibility([[[1]] * 2], 9))
    policy = kvprune.get_policy("guided:preset=published")
    assert policy == Guided(start=0.3, keep_ratio=0.3)
    assert (policy.choose(dataclasses.replace(before, num_layers=layers)).onward is not None) == (whole == 0)
    for rank in range(layers):
        decision = policy.select(dataclasses.replace(layer, rank=rank, num_layers=layers))
        assert (decision.onward is not None) == (rank == whole - 1)
    with pytest.raises(PolicyOptionError, match=r"a fraction of the .* layers below 1.*got 1\.5"):
        Guided(start=1.5)


def test_options():
    assert Guided().exact_budget == kvprune.Budget(keep_ratio=0.5)
    assert Guided(keep_tokens=3).exact_budget == kvprune.Budget(keep_tokens=3)
    assert Guided(keep_tokens=3, start=1).exact_budget is None
    assert Guided(keep_tokens=3, start=1).requested == {"keep_tokens": 3, "start": 1}
    assert kvprune.get_policy("guided:keep_ratio=0.1;start=2") == Guided(keep_ratio=0.1, start=2)
    assert Guided().needs == {"guidance"}
    with pytest.raises(PolicyOptionError, match="0 or more, got -1"):
        Guided(start=-1)
    with pytest.raises(PolicyOptionError, match="start"):
        kvprune.get_policy("guided:start=half")
    with pytest.raises(BudgetError, match="got 0"):
        Guided(keep_ratio=0.0)


@pytest.mark.slow
def test_the_suite_passes_with_layers_that_keep_everything():
    kvprune.testing.check_policy("guided:keep_ratio=0.3,start=2", examples=5)
