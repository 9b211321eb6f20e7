"""Generation with a compressed Mllama, situation by situation, against the untouched model."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from generation import LAYOUTS, POLICIES, TOLERANCE, difference_to_oracle, generate, mllama
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import kvprune
from kvprune.adapters.mllama.visibility import tiles_of_rows
from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.errors import PolicyNeverRanError, UnsupportedCacheError
from kvprune.testing import masked_oracle, mllama_inputs


def one_row_more(mask: torch.Tensor) -> torch.Tensor:
    """Repeat the last row for a new token, as generate does; all rows, because older releases need them."""
    return torch.cat([mask, mask[:, -1:]], dim=1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layouts", LAYOUTS, ids="+".join)
@pytest.mark.parametrize("spec", POLICIES)
def test_greedy_equals_the_oracle(spec, layouts, attention):
    model = mllama(torch.float32, attention)
    assert difference_to_oracle(model, mllama_inputs(layouts), spec) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("layouts", LAYOUTS, ids="+".join)
@pytest.mark.parametrize("spec", ["random:keep_ratio=0.3", "trim:k_ratio=0.1"])
def test_beams_equal_the_oracle(spec, layouts):
    inputs = mllama_inputs(layouts)
    assert difference_to_oracle(mllama(), inputs, spec, num_beams=3) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("spec", ["norm:keep_ratio=0.3", "trim:k_ratio=0.1"])
@pytest.mark.parametrize("options", [{"num_return_sequences": 3}, {"num_beams": 2}])
def test_seeded_sampling_equals_the_oracle(spec, options):
    model, inputs = mllama(), mllama_inputs(("tt4tt", "1ttt"))
    with kvprune.compress(model, spec) as run:
        torch.manual_seed(3)
        sequences, logits, _ = generate(model, inputs, do_sample=True, **options)
    with masked_oracle(model, run.selections, run.prefill_selections):
        torch.manual_seed(3)
        expected_sequences, expected, _ = generate(model, inputs, do_sample=True, **options)
    assert torch.equal(sequences, expected_sequences)
    assert (logits - expected).abs().max() <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("cross_layers", [(0, 1), (2,), (1, 2, 4, 5)])
def test_other_cross_layers(cross_layers):
    model, inputs = mllama(cross_layers=cross_layers), mllama_inputs(("t4tt", "1tttt"))
    if cross_layers[0] == 0:  # stock counts image columns as text there; the first step is what is defined
        with kvprune.compress(model, "trim:k_ratio=0.2") as run, torch.no_grad():
            logits = model(**inputs).logits
        with masked_oracle(model, run.selections, run.prefill_selections), torch.no_grad():
            assert (logits - model(**inputs).logits).abs().max() <= TOLERANCE[torch.float32]
        return
    assert difference_to_oracle(model, inputs, "trim:k_ratio=0.2") <= TOLERANCE[torch.float32]
    assert difference_to_oracle(model, inputs, "norm:keep_ratio=0.2") <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("spec", ["lossless", "norm:keep_ratio=0.5", "trim:keep_ratio=0.5"])
def test_bfloat16_runs_and_stays_close_to_the_oracle(spec):
    model, inputs = mllama(torch.bfloat16), mllama_inputs(("tt4tt", "1ttt"), dtype=torch.bfloat16)
    with kvprune.compress(model, spec) as run:
        _, logits, cache = generate(model, inputs, steps=1)
    with masked_oracle(model, run.selections, run.prefill_selections):
        _, expected, _ = generate(model, inputs, steps=1)
    assert logits.isfinite().all()
    assert (logits - expected).abs().max() < 0.1 * expected.abs().max()
    assert cache.layers[1].keys.dtype == torch.bfloat16


@pytest.mark.parametrize("spec", POLICIES)
def test_second_turn_with_a_new_image_equals_the_oracle(spec):
    """Turn 2 brings one new image, a mask over both images, and the cache of turn 1."""
    model = mllama()
    whole = mllama_inputs(("tt4ttt1tt", "tt2ttt4tt"))
    split = 6
    first = {name: tensor[:, :split] for name, tensor in whole.items() if "pixel" not in name}
    first |= {
        "aspect_ratio_ids": whole["aspect_ratio_ids"][:, :1],
        "pixel_values": whole["pixel_values"][:, :1],
    }
    first |= {"aspect_ratio_mask": whole["aspect_ratio_mask"][:, :1]}
    first["cross_attention_mask"] = whole["cross_attention_mask"][:, :split, :1]
    second = dict(whole)
    for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        second[name] = whole[name][:, 1:]

    with kvprune.compress(model, spec) as run, torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
        turn_1 = run.selections, run.prefill_selections
        _, logits, _ = generate(model, second, past_key_values=cache)
        turn_2 = run.selections, run.prefill_selections
    with masked_oracle(model, *turn_1), torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
    with masked_oracle(model, *turn_2):
        _, expected, _ = generate(model, second, past_key_values=cache)
    assert (logits - expected).abs().max() <= TOLERANCE[torch.float32]
    assert run.report.prefills == 2
    if spec != "full":  # decoding sees the second image only; the first one is gone for good
        assert all(selection.indices.min() >= 20 for selection in run.selections.values())


@pytest.mark.parametrize("spec", POLICIES)
def test_second_turn_of_text_only_equals_the_oracle(spec):
    model = mllama()
    whole = mllama_inputs(("tt4tttttt", "1tttttttt"))
    first = {
        name: tensor[:, :5] if name in ("input_ids", "attention_mask", "cross_attention_mask") else tensor
        for name, tensor in whole.items()
    }
    second = {name: whole[name] for name in ("input_ids", "attention_mask", "cross_attention_mask")}
    with kvprune.compress(model, spec) as run, torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
        _, logits, _ = generate(model, second, past_key_values=cache)
    with masked_oracle(model, run.selections, run.prefill_selections), torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
        _, expected, _ = generate(model, second, past_key_values=cache)
    assert (logits - expected).abs().max() <= TOLERANCE[torch.float32]
    assert run.report.prefills == 1


def test_text_only_calls_are_left_alone():
    model, inputs = mllama(), mllama_inputs(("ttttt", "ttt"))
    sequences, logits, _ = generate(model, inputs)
    with kvprune.compress(model, "trim:k_ratio=0.1") as run:
        got_sequences, got, cache = generate(model, inputs)
    assert torch.equal(sequences, got_sequences)
    assert torch.equal(logits, got)
    assert type(cache.layers[1]) is DynamicLayer
    assert run.report.encoder_inputs == 0


def test_a_cache_filled_before_the_block_is_adopted():
    model, inputs = mllama(), mllama_inputs(("tt4ttt", "t1tt"))
    step = {"input_ids": torch.tensor([[5], [6]]), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    step["attention_mask"][1, :2] = 0
    step["cross_attention_mask"] = one_row_more(inputs["cross_attention_mask"])
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        expected = model(**step, past_key_values=copy.deepcopy(cache)).logits
        with kvprune.compress(model, "trim:k_ratio=0.1"):
            got = model(**step, past_key_values=cache).logits
    assert torch.equal(got, expected)


def test_a_deep_copy_of_the_cache_serves_two_continuations():
    model, inputs = mllama(), mllama_inputs(("tt4ttt",))
    step = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.ones(1, 7, dtype=torch.long)}
    step["cross_attention_mask"] = one_row_more(inputs["cross_attention_mask"])
    with kvprune.compress(model, "norm:keep_ratio=0.3"), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        twin = copy.deepcopy(cache)
        first = model(**step, past_key_values=cache).logits
        assert torch.equal(model(**step, past_key_values=twin).logits, first)
    assert isinstance(twin.layers[1], CrossKVLayer)


def test_positional_arguments_reach_the_inner_model():
    model, inputs = mllama(), mllama_inputs(("tt4ttt",))
    with torch.no_grad():
        expected = model.model(**inputs, use_cache=True).last_hidden_state
        with kvprune.compress(model, "full"):
            order = ["input_ids", "pixel_values", "aspect_ratio_mask", "aspect_ratio_ids"]
            rest = {name: tensor for name, tensor in inputs.items() if name not in order}
            got = model.model(*(inputs[name] for name in order), **rest, use_cache=True).last_hidden_state
    assert torch.equal(got, expected)


def test_without_a_mask_every_row_sees_every_column():
    """Stock SDPA turns causal when the mask is missing; eager attention shows what is meant."""
    inputs = mllama_inputs(("4ttt",))
    del inputs["cross_attention_mask"]
    with torch.no_grad():
        expected = mllama(torch.float32, "eager")(**inputs, use_cache=True).logits
        with kvprune.compress(mllama(), "full"):
            got = mllama()(**inputs, use_cache=True).logits
        with kvprune.compress(mllama(), "norm:keep_ratio=0.3") as run:
            mllama()(**inputs, use_cache=True)
    assert (got - expected).abs().max() < 1e-4
    assert run.selections[1].indices.shape[-1] == 6  # 0.3 of 20 columns in all four tiles


def test_ragged_unions_without_a_mask_are_masked():
    inputs = mllama_inputs(("4ttt", "4ttt", "4ttt"), seed=3)
    del inputs["cross_attention_mask"]
    model = mllama()
    with kvprune.compress(model, "trim:k_ratio=0.1") as run, torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        step = {"input_ids": torch.tensor([[5]] * 3), "attention_mask": torch.ones(3, 5, dtype=torch.long)}
        together = model(**step, past_key_values=cache).logits
        assert run.selections[1].is_ragged
        for sample in range(3):
            alone = {name: tensor[sample : sample + 1] for name, tensor in inputs.items()}
            one = {name: tensor[sample : sample + 1] for name, tensor in step.items()}
            cache = model(**alone, use_cache=True).past_key_values
            logits = model(**one, past_key_values=cache).logits
            assert (logits - together[sample : sample + 1]).abs().max() < 1e-4


def test_the_drafts_of_assisted_decoding_come_after_the_prefill():
    model, inputs = mllama(), mllama_inputs(("tt4tttt",))
    inputs["input_ids"][0, 3:] = torch.tensor([7, 8, 7, 8])  # so that prompt lookup finds drafts at once
    rows = []
    with kvprune.compress(model, "trim:k_ratio=0.1") as run:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        expected = run.selections
        layer = model.model.language_model.layers[0]
        hook = layer.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
        model.generate(**inputs, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
        hook.remove()
    assert run.selections == expected
    assert rows[0] == 7
    assert max(rows[1:]) > 1  # later calls verify drafts


@pytest.mark.parametrize("spec", ["full", "trim:k_ratio=0.1"])
def test_prompt_lookup_equals_greedy(spec):
    """Stock transformers crashes here, because it crops image columns with the drafts."""
    model = mllama()
    inputs = mllama_inputs(("tt4tttt",))
    inputs["input_ids"][0, 3:] = torch.tensor([7, 8, 7, 8])
    with kvprune.compress(model, spec):
        expected, _, _ = generate(model, inputs, steps=12)
        got = model.generate(**inputs, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(got, expected)


def test_caches_that_offload_are_refused_before_any_layer_has_run():
    model, inputs = mllama(), mllama_inputs(("tt4ttt",))
    cache = DynamicCache(config=model.config, offloading=True)
    with pytest.raises(UnsupportedCacheError, match="offloads"), kvprune.compress(model, "lossless"):
        model(**inputs, past_key_values=cache, use_cache=True)
    assert not cache.layers[0].is_initialized


def test_sliding_layers_in_the_place_of_images_are_refused_by_name():
    model, inputs = mllama(), mllama_inputs(("tt4ttt",))
    cache = DynamicCache(config=model.config)
    cache.layers[3] = DynamicSlidingWindowLayer(8)
    with (
        pytest.raises(UnsupportedCacheError, match="DynamicSlidingWindowLayer at cross-attention layer 3"),
        kvprune.compress(model, "lossless"),
    ):
        model(**inputs, past_key_values=cache, use_cache=True)


def test_a_cache_of_another_batch_size_is_refused():
    """A single row that is held would otherwise be broadcast without a word."""
    model = mllama(torch.float32, "sdpa", (0, 2))
    inputs = mllama_inputs(("tt4ttt", "tt4ttt"))
    with kvprune.compress(model, "trim"), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        step = {"input_ids": torch.full((1, 1), 9), "position_ids": torch.tensor([[6]])}
        step["cross_attention_mask"] = inputs["cross_attention_mask"][:1, -1:]
        with pytest.raises(UnsupportedCacheError, match="holds 2 rows, but the batch has 1"):
            model(**step, past_key_values=cache)


def test_without_a_cache_a_policy_that_prunes_after_attention_is_refused():
    model, inputs = mllama(), mllama_inputs(("tt4ttt",))
    with pytest.raises(UnsupportedCacheError, match="use_cache=True"), kvprune.compress(model, "norm"):
        generate(model, inputs, use_cache=False)


def test_a_cache_without_a_config_is_grown():
    model, inputs = mllama(), mllama_inputs(("tt4ttt",))
    with kvprune.compress(model, "lossless") as run:
        model(**inputs, past_key_values=DynamicCache(), use_cache=True)
    assert run.report.prefills == 1


def test_a_mask_over_the_wrong_images_is_refused():
    model = mllama()
    whole = mllama_inputs(("tt4ttt1tt",))
    with kvprune.compress(model, "lossless"), torch.no_grad():
        first = {name: whole[name] for name in ("input_ids", "attention_mask")}
        for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
            first[name] = whole[name][:, :1]
        first["cross_attention_mask"] = whole["cross_attention_mask"][:, :, :1]
        cache = model(**first, use_cache=True).past_key_values
        again = {name: tensor for name, tensor in first.items() if name != "attention_mask"}
        with pytest.raises(UnsupportedCacheError, match="mask over all images of the conversation"):
            model(**again, past_key_values=cache)
        step = {
            "input_ids": torch.tensor([[5]]),
            "cross_attention_mask": one_row_more(whole["cross_attention_mask"]),
        }
        with pytest.raises(UnsupportedCacheError, match=r"covers 8 tiles of 5 columns.*has seen 20 columns"):
            model(**step, past_key_values=cache)


def test_a_policy_that_never_ran_raises(monkeypatch):
    model, inputs = mllama(), mllama_inputs(("tt4ttt",))
    run = kvprune.compress(model, "lossless")
    monkeypatch.setattr(type(run._manager), "after_layer", lambda *args, **kwargs: None)
    with pytest.raises(PolicyNeverRanError, match="lossless never ran"), run:
        model(**inputs, use_cache=True)


def test_text_before_a_second_image_does_not_spoil_its_ranking():
    """Rows of turn 2 that still look at the first image say nothing about the second one."""
    model = mllama()
    whole = mllama_inputs(("t4tttt4tt",))
    first = {name: whole[name][:, :4] for name in ("input_ids", "attention_mask")}
    first["cross_attention_mask"] = whole["cross_attention_mask"][:, :4, :1]
    second = dict(whole)
    for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        first[name], second[name] = whole[name][:, :1], whole[name][:, 1:]
    seen = []

    @dataclass(frozen=True, kw_only=True)
    class Watching(type(kvprune.get_policy("trim"))):
        def select(self, view):
            seen.append(view.attention_mass())
            return super().select(view)

    with kvprune.compress(model, Watching(keep_ratio=0.2)) as run, torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
        generate(model, second, past_key_values=cache, steps=2)
    assert all(mass.isfinite().all() for mass in seen)
    assert seen[3].sum(-1).round().unique().tolist() == [3.0]  # the image token and two text rows see it
    assert run.selections[1].counts.tolist() == [[4]]


@pytest.mark.parametrize("spec", POLICIES)
def test_a_batch_of_which_one_sample_gets_a_second_image_equals_the_oracle(spec):
    model = mllama()
    whole = mllama_inputs(("t4ttt4tt", "t4tttttt"))
    first = {name: whole[name][:, :5] for name in ("input_ids", "attention_mask")}
    first["cross_attention_mask"] = whole["cross_attention_mask"][:, :5, :1]
    second = dict(whole)
    for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        first[name], second[name] = whole[name][:, :1], whole[name][:, 1:]
    with kvprune.compress(model, spec) as run, torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
        turn_1 = run.selections, run.prefill_selections
        _, logits, _ = generate(model, second, past_key_values=cache)
    with masked_oracle(model, *turn_1), torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
    with masked_oracle(model, run.selections, run.prefill_selections):
        _, expected, _ = generate(model, second, past_key_values=cache)
    assert (logits - expected).abs().max() <= TOLERANCE[torch.float32]
    if spec != "full":
        kept = run.selections[1].to_mask()
        assert not kept[0, :, :20].any()  # sample 0 looks at its second image only
        assert not kept[1, :, 20:].any()  # sample 1 has none


class _OfStaticCache:
    """What `tiles_of_rows` asks of a static cache: its length is computed on the device."""

    def __init__(self, seen):
        self.filled = torch.arange(12) < seen

    def get_seq_length(self):
        return self.filled.sum()


@pytest.mark.parametrize("seen", [0, 3, 5, 9])
def test_rows_of_a_whole_conversation_are_found_without_a_branch_on_data(seen):
    mask = (torch.rand(2, 6, 1, 4, generator=torch.Generator().manual_seed(0)) < 0.5).long()
    find = torch.compile(tiles_of_rows, fullgraph=True, backend="eager")
    found = find(mask, 2, _OfStaticCache(seen))
    rows = [min(row, 5) for row in (seen, seen + 1)]  # draft tokens have no row; the last one is theirs
    assert torch.equal(found, mask[:, rows].flatten(2) == 1)
    counted = DynamicCache()
    counted.update(torch.zeros(2, 1, seen, 1), torch.zeros(2, 1, seen, 1), 0)
    assert torch.equal(tiles_of_rows(mask, 2, counted), found)
