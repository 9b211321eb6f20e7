"""Merging: buckets, sums, what is refused, and generation against the oracle."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from generation import LAYOUTS, TOLERANCE, bart, difference_to_oracle, generate, mllama
from helpers import make_view, make_visibility
from hypothesis import given
from hypothesis import strategies as st
from merging_policies import MergesCaches, MergesFeatures

import kvprune
from kvprune import Decision, Selection
from kvprune.adapters.features import gather_features
from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.errors import SelectionError
from kvprune.policy.checks import check_decision
from kvprune.testing import masked_oracle, mllama_inputs
from kvprune.testing.oracle_arithmetic import with_merges
from kvprune.tokens.buckets import merge_mean, merge_weighted, nearest
from kvprune.tokens.merging import Merge, merge_features, merge_heads
from kvprune.tokens.reindexing import compose

CACHES = (
    MergesCaches(),
    MergesCaches(by_head=False, bias=True),
    MergesCaches(weighted=True, renormalize=True),
    MergesCaches(renormalize=True, bias=True),
)
FEATURES = (MergesFeatures(), MergesFeatures(later=True), MergesFeatures(later=True, bias=True))


def label(policy):
    return str(policy.spec)


def masks(least=1):
    """Kept columns and runs of cells, as lists."""
    return st.integers(least, 8).flatmap(
        lambda width: st.tuples(
            st.lists(st.booleans(), min_size=width, max_size=width).filter(any),
            st.lists(st.integers(0, 1), min_size=width, max_size=width),
            st.lists(st.booleans(), min_size=width, max_size=width),
        )
    )


@given(masks())
def test_nearest_is_the_closest_kept_column_of_the_cell_and_the_lower_of_two(drawn):
    kept, borders, joining = drawn
    cells = [sum(borders[: column + 1]) if joins else -1 for column, joins in enumerate(joining)]
    found = nearest(torch.tensor([[kept]]), torch.tensor([cells]))[0, 0].tolist()
    for column, cell in enumerate(cells):
        inside = [anchor for anchor, is_kept in enumerate(kept) if is_kept and cells[anchor] == cell >= 0]
        expected = min(inside, key=lambda anchor: (abs(anchor - column), anchor), default=-1)
        # Cells are runs: an anchor beyond a column of another cell does not count as near.
        assert found[column] == (column if kept[column] else expected)


def slow_sums(tokens, into, weights, entries):
    sums = torch.zeros(entries, tokens.shape[-1], dtype=torch.float64)
    for token, entry, weight in zip(tokens, into, weights, strict=True):
        if entry >= 0:
            sums[entry] += weight * token.double()
    return sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 2**21])
def test_sums_are_those_of_loops_however_they_are_cut(dtype, chunk, monkeypatch):
    monkeypatch.setattr("kvprune.tokens.merging._ELEMENTS_PER_CHUNK", chunk)
    random = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 3, 7, 5, generator=random).to(dtype)
    into = torch.randint(-1, 3, (2, 3, 7), generator=random)
    weights = torch.rand(2, 3, 7, generator=random)
    tokens[..., 0, :], into[..., 0] = torch.inf, -1  # what is dropped outright may hold anything
    merged = merge_heads(tokens, Merge(into, weights), 3)
    features = merge_features(tokens[:, 0], into[:, 0], weights[:, 0], 3)
    assert merged.dtype == features.dtype == dtype
    for row in range(2):
        for head in range(3):
            wanted = slow_sums(tokens[row, head], into[row, head].tolist(), weights[row, head].tolist(), 3)
            tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 0.02)
            assert (merged[row, head].double() - wanted).abs().max() <= tolerance
    assert torch.equal(features, merged[:, 0])


def test_what_is_alone_stays_as_it_is_to_the_last_bit():
    tokens = torch.randn(1, 2, 5, 8).to(torch.bfloat16)
    alone = Merge(torch.tensor([[[0, -1, 1, -1, 2]]]), torch.ones(1, 1, 5))
    for renormalize in (False, True):
        merged = merge_heads(tokens, alone, 3, renormalize=renormalize)
        assert torch.equal(merged, tokens[:, :, [0, 2, 4]])


def test_renormalised_keys_have_the_mean_length_of_their_members():
    keys = torch.tensor([[[[3.0, 0.0], [0.0, 1.0], [2.0, 0.0], [-2.0, 0.0]]]])
    merge = Merge(torch.tensor([[[0, 0, 1, 1]]]), torch.full((1, 1, 4), 0.5))
    merged = merge_heads(keys, merge, 2, renormalize=True)
    assert merged[0, 0, 0].norm() == pytest.approx(2.0)
    assert merged[0, 0, 1].tolist() == [0, 0]  # opposite keys leave no direction


def test_composed_merges_equal_one_after_the_other():
    features = torch.randn(2, 9, 4, dtype=torch.float64)
    kept = torch.rand(2, 1, 9) < 0.6
    kept[..., [0, 4]] = True
    cells = torch.zeros(1, 9, dtype=torch.int64)
    first = merge_mean(kept, nearest(kept, cells))
    again = (torch.rand(2, 1, first.indices.shape[-1]) < 0.5) & first.valid
    again[..., 0] = True
    second = merge_mean(again, nearest(again, torch.where(first.valid[:, 0], 0, -1)))
    total = compose(first, second)
    stepwise = gather_features(gather_features(features, first), second)
    at_once = gather_features(features, total)
    assert ((stepwise - at_once).abs().amax(-1) * total.valid[:, 0]).max() < 1e-12
    dropping = compose(first, Selection.from_mask(again))  # merged before, and then dropped with its members
    plain = gather_features(features, first).gather(1, dropping_index(again, first))
    assert ((gather_features(features, dropping) - plain).abs().amax(-1) * dropping.valid[:, 0]).max() < 1e-12
    later = compose(Selection.from_mask(kept), second)  # dropped before, and then merged
    plain = gather_features(gather_features(features, Selection.from_mask(kept)), second)
    assert ((gather_features(features, later) - plain).abs().amax(-1) * later.valid[:, 0]).max() < 1e-12


def dropping_index(kept, first):
    return Selection.from_mask(kept).indices[:, 0, :, None].expand(-1, -1, 4)


def test_features_are_merged_with_gradients_and_padding_repeats_the_last():
    kept = torch.tensor([[[True, False, True]], [[True, False, False]]])
    selection = merge_mean(kept, torch.tensor([[[0, 0, 2]], [[0, 0, 0]]]))
    features = torch.randn(2, 3, 4, requires_grad=True)
    merged = gather_features(features, selection)
    assert torch.equal(merged[1, 0], merged[1, 1])
    merged[0, 0].sum().backward()
    assert features.grad[0].tolist() == [[0.5] * 4, [0.5] * 4, [0.0] * 4]


def test_selections_with_merges_repeat_and_compare():
    kept = torch.tensor([[[True, False, True]], [[False, True, True]]])
    selection = merge_mean(kept, torch.tensor([[[0, 0, 2]], [[1, 1, 2]]]))
    assert selection.repeat(2).every(2) == selection
    assert selection.repeat(2).merge.into.shape == (4, 1, 3)
    assert selection != Selection.from_mask(kept)
    assert Selection.from_mask(kept) != selection
    assert selection != dataclasses.replace(
        selection, merge=dataclasses.replace(selection.merge, size_bias=True)
    )
    assert "merged" in repr(selection)


@pytest.mark.parametrize(
    ("buckets", "weights", "message"),
    [
        ([[[0, 1, 2]]], torch.ones(1, 1, 3), "anchor is not kept"),
        ([[[0, 7, 2]]], torch.ones(1, 1, 3), "anchor is not kept"),
        ([[[2, 0, 2]]], torch.ones(1, 1, 3), "a kept column is the anchor of its own bucket"),
        ([[[0, 0]]], torch.ones(1, 1, 2), r"buckets \(int64\) and weights"),
        ([[[0, 0, 2]]], torch.ones(1, 1, 2), "and weights have the shape of kept"),
    ],
)
def test_buckets_that_make_no_sense_raise(buckets, weights, message):
    with pytest.raises(SelectionError, match=f"KV15.*{message}"):
        merge_weighted(torch.tensor([[[True, False, True]]]), torch.tensor(buckets), weights)


# Two images of two columns and a padding tile; the first image is seen by row 0 alone, both by row 1.
VIEW = make_view(make_visibility([[[1, 0, 0], [1, 1, 0]]], 2, images=[0, 1, 1]))
KEPT = torch.tensor([[[True, False, True, False, False, False]]])
SOUND = merge_mean(KEPT, torch.tensor([[[0, 0, 2, 2, -1, -1]]]))


def with_merge(**parts):
    return dataclasses.replace(SOUND, merge=dataclasses.replace(SOUND.merge, **parts))


def into(*entries):
    return torch.tensor([[list(entries)]])


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (dataclasses.replace(SOUND, merge="all"), "merges by a str, expected a Merge"),
        (
            with_merge(into=into(0, 0, 1, 1, -1, -1).int()),
            "merge.into is torch.int64 .1, 1, 6., got torch.int32",
        ),
        (
            with_merge(into=into(0, 0, 1)),
            r"merge.into is torch.int64 \[1, 1, 6\], got torch.int64 \[1, 1, 3\]",
        ),
        (with_merge(weights=torch.ones(1, 1, 6).half()), "merge.weights is torch.float32 or torch.float64"),
        (with_merge(into=into(0, 0, 1, 2, -1, -1)), "names an entry that is not kept"),
        (with_merge(into=into(0, 0, 1, -2, -1, -1)), "names an entry that is not kept"),
        (with_merge(into=into(0, 0, -1, -1, -1, -1)), "merges a kept column into another entry"),
        (with_merge(weights=torch.full((1, 1, 6), torch.nan)), "weight that is NaN"),
        (with_merge(into=into(0, 0, 1, 1, 1, -1)), "merges unseen columns into seen ones"),
        (with_merge(into=into(0, 0, 1, 0, -1, -1)), "columns of one image into another"),
        (with_merge(carried=torch.zeros(1, 1, 2)), "carried is only for reports"),
    ],
)
def test_a_merge_that_breaks_kv15_is_refused(selection, message):
    check_decision(Decision(cache=SOUND, onward=SOUND), VIEW, "test")
    with pytest.raises(SelectionError, match=f"KV15: policy 'test' at layer 3: .*{message}"):
        check_decision(Decision(cache=selection), VIEW, "test")


def test_onward_merges_features_alone_and_within_what_the_same_rows_see():
    for parts in ({"size_bias": True}, {"renormalize_keys": True}):
        with pytest.raises(SelectionError, match=r"KV15.*onward merges features"):
            check_decision(Decision(onward=with_merge(**parts)), VIEW, "test")
    # One image whose second tile only the last row sees: its cache may merge them, other rows must not.
    view = make_view(make_visibility([[[1, 0], [1, 1]]], 1))
    kept = torch.tensor([[[True, True]]])
    selection = Selection.from_mask(kept)
    one = make_view(make_visibility([[[1, 0], [1, 1]]], 2))
    merged = merge_mean(torch.tensor([[[True, False, True, False]]]), torch.tensor([[[0, 0, 2, 0]]]))
    check_decision(Decision(cache=merged), one, "test")
    with pytest.raises(SelectionError, match=r"KV15.*other text rows see"):
        check_decision(Decision(onward=merged), one, "test")
    check_decision(Decision(onward=selection), view, "test")


# Generation


@pytest.mark.parametrize("layouts", LAYOUTS, ids="+".join)
@pytest.mark.parametrize("policy", [*CACHES, *FEATURES], ids=label)
def test_generation_equals_the_oracle(policy, layouts):
    inputs = mllama_inputs(layouts, dtype=torch.float64)
    assert difference_to_oracle(mllama(torch.float64), inputs, policy, steps=3) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("policy", [CACHES[3], FEATURES[2]], ids=label)
@pytest.mark.parametrize(
    ("attention", "options"),
    [
        ("eager", {}),
        ("sdpa", {"num_beams": 3}),
        ("sdpa", {"num_return_sequences": 2, "do_sample": True}),
        ("sdpa", {"cache_implementation": "static"}),
    ],
)
def test_beams_sampling_and_other_caches_equal_the_oracle(policy, attention, options):
    inputs = mllama_inputs(("tt4ttt", "t1tt", "14ttt"))
    if "cache_implementation" in options:
        model = mllama()
        with kvprune.compress(model, policy):
            _, static, _ = generate(model, inputs, **options)
        with kvprune.compress(model, policy):
            _, dynamic, _ = generate(model, inputs)
        assert (static - dynamic).abs().max() <= TOLERANCE[torch.float32]
        return
    assert difference_to_oracle(mllama(torch.float32, attention), inputs, policy, **options) <= 1e-5


@pytest.mark.parametrize("policy", [CACHES[3], FEATURES[2]], ids=label)
@pytest.mark.parametrize("beams", [1, 2])
def test_encoder_decoder_models_equal_the_oracle(policy, beams):
    ids = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3])}
    for attention in ("sdpa", "eager"):
        model = bart(torch.float32, attention)
        assert difference_to_oracle(model, inputs, policy, num_beams=beams) <= 1e-5


@pytest.mark.parametrize("policy", [CACHES[3], FEATURES[0]], ids=label)
def test_the_oracle_sees_a_merge(policy):
    """Without what was merged, and without the bias, it says something else."""
    model, inputs = mllama(torch.float64), mllama_inputs(("tt4ttt", "2ttt"), dtype=torch.float64)
    with kvprune.compress(model, policy) as run:
        _, logits, _ = generate(model, inputs)

    def forgetful(selection):
        return selection and dataclasses.replace(selection, merge=None)

    kept = {layer: forgetful(selection) for layer, selection in run.selections.items()}
    early = {layer: forgetful(selection) for layer, selection in run.prefill_selections.items()}
    with masked_oracle(model, kept, early):
        _, without, _ = generate(model, inputs)
    assert (logits[1:] - without[1:]).abs().max() > 1e-3
    if policy is CACHES[3]:
        unbiased = {
            layer: dataclasses.replace(selection, merge=dataclasses.replace(selection.merge, size_bias=False))
            for layer, selection in run.selections.items()
        }
        with masked_oracle(model, unbiased, run.prefill_selections):
            _, without, _ = generate(model, inputs)
        assert (logits[1:] - without[1:]).abs().max() > 1e-3


@pytest.mark.parametrize("policy", [*CACHES, *FEATURES], ids=label)
def test_a_second_image_in_the_next_turn_equals_the_oracle(policy):
    """Both images stay in sight, so entries of the first keep their bias while the second one merges."""
    model = mllama(torch.float64)
    whole = mllama_inputs(("tt4ttt1tt", "tt2ttt4tt"), dtype=torch.float64)
    whole["cross_attention_mask"][:, 6:] |= whole["cross_attention_mask"][:, 5:6]
    split = 6
    first = {n: tensor[:, :split] for n, tensor in whole.items() if "pixel" not in n}
    for n in ("aspect_ratio_ids", "pixel_values", "aspect_ratio_mask"):
        first[n] = whole[n][:, :1]
    first["cross_attention_mask"] = whole["cross_attention_mask"][:, :split, :1]
    second = dict(whole) | {
        n: whole[n][:, 1:] for n in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    }
    with kvprune.compress(model, policy) as run, torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
        turn_1 = run.selections, run.prefill_selections
        _, logits, _ = generate(model, second, past_key_values=cache)
        turn_2 = run.selections, run.prefill_selections
    with masked_oracle(model, *turn_1), torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
    with masked_oracle(model, *turn_2):
        _, expected, _ = generate(model, second, past_key_values=cache)
    assert (logits - expected).abs().max() <= TOLERANCE[torch.float64]
    if getattr(policy, "bias", False):
        merge = turn_2[0][3].merge
        assert merge.carried.any()
        assert not merge.carried[turn_2[0][3].indices >= 20].any()


def test_what_was_merged_is_reported_for_each_row_of_the_batch():
    model, inputs = mllama(), mllama_inputs(("tt4tt", "1ttt"))
    with kvprune.compress(model, MergesFeatures(later=True)) as run:
        generate(model, inputs, num_beams=3)
    for layer_idx in (1, 3, 5):
        for selection in (run.selections[layer_idx], run.prefill_selections[layer_idx]):
            assert selection.merge.into.shape[0] == 6
            assert torch.equal(selection.merge.into[0], selection.merge.into[2])
    with kvprune.compress(model, MergesFeatures()) as run:
        generate(model, inputs)
    assert all(selection.merge is None for selection in run.selections.values())
    assert all(selection.merge is not None for selection in run.prefill_selections.values())


def test_features_are_merged_without_a_cache_and_in_training():
    model, inputs = copy.deepcopy(mllama()), mllama_inputs(("4tt",))
    with kvprune.compress(model, MergesFeatures()) as run:
        logits = model(**inputs, use_cache=False).logits
        logits.sum().backward()
    assert model.model.multi_modal_projector.weight.grad.abs().max() > 0
    assert run.prefill_selections[1].merge is not None
    with torch.no_grad(), kvprune.compress(model, MergesFeatures()):
        assert (model(**inputs).logits - logits).abs().max() <= 1e-5


def test_half_precision_keeps_its_dtype_and_stays_finite():
    model, inputs = mllama(torch.bfloat16), mllama_inputs(("tt4tt", "1ttt"), dtype=torch.bfloat16)
    with kvprune.compress(model, CACHES[3]):
        _, logits, cache = generate(model, inputs, steps=2)
    assert logits.isfinite().all()
    assert cache.layers[1].keys.dtype == torch.bfloat16
    assert cache.layers[1].bias.dtype == torch.float32


def test_bias_is_counted_as_bookkeeping_and_forgotten_at_reset():
    layer = CrossKVLayer()
    layer.update(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4))
    selection = merge_mean(torch.tensor([[[True, False, True]]]), torch.tensor([[[0, 0, 2]]]), size_bias=True)
    layer.retain(selection)
    assert layer.bias.tolist() == [[[pytest.approx(0.6931472), 0.0]]]
    parts = layer.slots.nbytes + layer.valid.nbytes + layer.bias.nbytes
    assert layer.bytes_of_bookkeeping == parts
    layer.reset()
    assert layer.bias is None


def test_loops_of_the_oracle_overwrite_kept_columns_only():
    full = torch.arange(6.0).reshape(1, 1, 6, 1)
    changed = with_merges(full, SOUND)
    assert changed.flatten().tolist() == [0.5, 1.0, 2.5, 3.0, 4.0, 5.0]
