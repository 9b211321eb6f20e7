"""KV01 to KV15, each by its name, on models, layouts and policies drawn by hypothesis.

docs/invariants.md says what each of them means to users.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from cache_machine import CacheMachine
from generation import POLICIES, TOLERANCE, bart, difference_to_oracle, generate, mllama, whisper
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

import kvprune
from kvprune.adapters.arguments import cache_of
from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.errors import NestedCompressionError, SelectionError
from kvprune.testing import mllama_inputs
from kvprune.tokens.budget import Budget
from kvprune.tokens.decision import Decision
from kvprune.tokens.selection import Selection
from kvprune.tokens.visibility import Visibility

few = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# A header, then images (one to four tiles) each followed by text; at least one image somewhere.
samples = st.from_regex(r"t{0,3}([1-4]{1,2}t{1,3}){0,2}t", fullmatch=True)
batches = st.lists(samples, min_size=1, max_size=3).filter(
    lambda batch: any(letter.isdigit() for letter in "".join(batch))
)
ratios = st.sampled_from([0.01, 0.1, 0.25, 0.3, 0.5, 0.75, 1.0])
ranking = st.sampled_from(
    ["random", "norm", "norm:of=keys,keep=low", "random:reach=onward", "norm:reach=onward", "trim"]
)
lossy = st.sampled_from([spec for spec in POLICIES if spec not in ("full", "lossless")])


def with_ratio(spec: str, ratio: float) -> str:
    return f"{spec}{',' if ':' in spec else ':'}keep_ratio={ratio}"


def prefill(spec, inputs, seed: int = 0, model=None):
    with kvprune.compress(model or mllama(), spec, seed=seed) as run, torch.no_grad():
        (model or mllama())(**inputs, use_cache=True)
    return run


def seen_by_decoding(inputs) -> torch.Tensor:
    """Columns that the last row may attend, straight from the processor's mask, bool [B, S]."""
    last = inputs["cross_attention_mask"][:, -1].flatten(1).bool()
    return last.repeat_interleave(5, dim=-1)


@few
@given(batches, lossy, st.integers(0, 3))
def test_kv01_indices_are_increasing_columns_of_the_unpruned_cache(batch, spec, seed):
    inputs = mllama_inputs(batch, seed)
    columns = inputs["cross_attention_mask"][0, 0].numel() * 5
    for selection in prefill(spec, inputs).selections.values():
        assert selection.indices.dtype == torch.int64
        assert selection.indices.shape == selection.valid.shape
        assert selection.indices.shape[0] == len(batch)
        assert selection.indices.shape[1] in (1, 2)
        assert selection.columns == columns
        for row, valid in zip(selection.indices.flatten(0, 1), selection.valid.flatten(0, 1), strict=True):
            kept = row[valid].tolist()
            assert kept == sorted(set(kept))
            assert 0 <= kept[0] <= kept[-1] < columns
            assert row[~valid].tolist() == [kept[-1]] * int((~valid).sum())


@few
@given(batches, ranking, ratios)
@example(["4ttt"], "random", 0.1)
def test_kv02_the_budget_is_exact(batch, spec, ratio):
    inputs = mllama_inputs(batch)
    visible = seen_by_decoding(inputs)
    images = inputs["cross_attention_mask"][:, -1].any(-1).sum(-1)
    for selection in prefill(with_ratio(spec, ratio), inputs).selections.values():
        for sample, size in enumerate(visible.sum(-1).tolist()):
            if size:  # one token of each image that decoding sees stays even if the budget is smaller
                wanted = max(Budget(keep_ratio=ratio).resolve(size), int(images[sample]))
                assert selection.counts[sample].unique().tolist() == [wanted]


@few
@given(batches, st.sampled_from(["random", "norm", "random:reach=onward", "trim"]))
def test_kv03_no_sample_and_no_visible_image_is_left_without_a_token(batch, spec):
    inputs = mllama_inputs(batch)
    run = prefill(f"{spec}{',' if ':' in spec else ':'}keep_ratio=0.01", inputs)
    last = inputs["cross_attention_mask"][:, -1].any(-1)  # [B, images]
    for selection in run.selections.values():
        kept_images = selection.to_mask().unflatten(-1, (-1, 20)).any(-1)  # [B, H, images]
        assert selection.counts.min() >= 1
        assert (kept_images | ~last[:, None]).all()


@few
@given(batches, lossy)
def test_kv04_padding_is_not_kept_while_a_visible_token_is_dropped(batch, spec):
    inputs = mllama_inputs(batch)
    visible = seen_by_decoding(inputs)[:, None]
    for selection in prefill(spec, inputs).selections.values():
        kept = selection.to_mask()
        padding_kept = (kept & ~visible).any(-1) & visible.any(-1)
        assert not padding_kept.any()


@few
@given(batches, st.sampled_from(["trim:k_ratio=0.05", "random:keep_ratio=0.05,reach=onward"]))
def test_kv05_a_row_that_saw_a_token_still_sees_one(batch, spec):
    inputs = mllama_inputs(batch)
    rows = inputs["cross_attention_mask"].flatten(2).bool().repeat_interleave(5, dim=-1)  # [B, T, S]
    rows = rows & inputs["attention_mask"].bool()[..., None]
    run = prefill(spec, inputs)
    assert any(selection is not None for selection in run.prefill_selections.values())
    for selection in run.prefill_selections.values():
        if selection is not None:
            kept = selection.to_mask()[:, 0, None]
            assert ((rows & kept).any(-1) == rows.any(-1)).all()


@few
@given(batches, lossy)
def test_kv06_the_mask_is_as_wide_as_what_is_held(batch, spec):
    model, widths = mllama(), []

    def record(module, args, kwargs, output):
        layer = cache_of(kwargs).layers[module.layer_idx]
        attended = (
            kwargs["cross_attention_states"] if kwargs["cross_attention_states"] is not None else layer.keys
        )
        mask = kwargs["attention_mask"]
        widths.append((mask.shape[-1], attended.shape[-2], mask.shape[0], args[0].shape[0] if args else None))

    handles = [
        model.model.language_model.layers[i].cross_attn.register_forward_hook(record, with_kwargs=True)
        for i in (1, 3, 5)
    ]
    try:
        with kvprune.compress(model, spec):
            generate(model, mllama_inputs(batch), steps=3)
    finally:
        for handle in handles:
            handle.remove()
    assert len(widths) == 9
    assert all(mask == held for mask, held, *_ in widths)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
def test_kv07_keep_all_is_bit_identical(dtype, attention, options):
    model = mllama(dtype, attention)
    for batch in (["tt4ttt"], ["tt4ttt", "t1tt", "tttt"], ["t1tt4tt", "24tt"]):
        if dtype == torch.float64 and attention == "eager" and len(batch) > 1:
            continue  # left padding is NaN in stock transformers there
        inputs = mllama_inputs(batch, dtype=dtype)
        torch.manual_seed(0)
        expected_sequences, expected, _ = generate(model, inputs, **options)
        with kvprune.compress(model, "full"):
            torch.manual_seed(0)
            sequences, logits, _ = generate(model, inputs, **options)
        assert torch.equal(sequences, expected_sequences)
        assert torch.equal(logits, expected)


@pytest.mark.parametrize(
    "spec", ["random:keep_ratio=1", "norm:keep_ratio=1", "trim:k_ratio=1", "trim:keep_ratio=1"]
)
def test_kv07_every_policy_that_keeps_all_is_bit_identical_where_all_is_visible(spec):
    model, inputs = mllama(), mllama_inputs(["4tttt", "4ttt"])
    _, expected, _ = generate(model, inputs)
    with kvprune.compress(model, spec) as run:
        _, logits, _ = generate(model, inputs)
    assert torch.equal(logits, expected)
    assert run.report.bytes_held == run.report.bytes_full


@few
@given(batches, st.sampled_from([torch.float64, torch.float32]))
def test_kv08_lossless_changes_nothing_in_decode(batch, dtype):
    model, inputs = mllama(dtype), mllama_inputs(batch, dtype=dtype)
    expected_sequences, expected, _ = generate(model, inputs)
    with kvprune.compress(model, "lossless") as run:
        sequences, logits, _ = generate(model, inputs)
    assert torch.equal(sequences, expected_sequences)
    assert (logits - expected).abs().max() <= TOLERANCE[dtype]
    visible = seen_by_decoding(inputs)
    if visible.any(-1).all():
        assert run.report.kept_fraction == 1.0
        assert run.selections[1].counts.max() == visible.sum(-1).max()


@few
@given(batches, lossy, st.randoms(use_true_random=False))
def test_kv09_the_order_of_kept_tokens_is_irrelevant(batch, spec, random):
    model, inputs = mllama(torch.float64), mllama_inputs(batch, dtype=torch.float64)
    size = inputs["input_ids"].shape
    step = {
        "input_ids": torch.full((size[0], 1), 9),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(size[0], 1, dtype=torch.long)], 1),
        "cross_attention_mask": torch.cat(
            [inputs["cross_attention_mask"], inputs["cross_attention_mask"][:, -1:]], 1
        ),
    }
    with kvprune.compress(model, spec), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        shuffled = copy.deepcopy(cache)
        for layer in shuffled.layers:
            if isinstance(layer, CrossKVLayer) and layer.slots is not None:
                order = list(range(layer.keys.shape[-2]))
                random.shuffle(order)
                layer.keys, layer.values = layer.keys[:, :, order], layer.values[:, :, order]
                layer.slots, layer.valid = layer.slots[..., order], layer.valid[..., order]
        expected = model(**step, past_key_values=cache).logits
        logits = model(**step, past_key_values=shuffled).logits
    assert (logits - expected).abs().max() <= 1e-6


@few
@given(batches, lossy, st.integers(0, 5))
def test_kv10_a_sample_selects_alone_what_it_selects_in_a_batch(batch, spec, seed):
    assume(all(any(letter.isdigit() for letter in sample) for sample in batch))
    together = prefill(spec, mllama_inputs(batch), seed)
    inputs = mllama_inputs(batch)
    for index, sample in enumerate(batch):
        length, images = len(sample), sum(letter.isdigit() for letter in sample)
        alone = {name: tensor[index : index + 1] for name, tensor in inputs.items()}
        for name in ("input_ids", "attention_mask", "cross_attention_mask"):
            alone[name] = alone[name][:, -length:]
        for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
            alone[name] = alone[name][:, :images]
        alone["cross_attention_mask"] = alone["cross_attention_mask"][:, :, :images]
        run = prefill(spec, alone, seed)
        for layer_idx, selection in run.selections.items():
            columns = selection.columns
            assert torch.equal(
                selection.to_mask(), together.selections[layer_idx].to_mask()[index : index + 1, :, :columns]
            )


@few
@given(batches, lossy, st.integers(0, 5))
def test_kv10_policies_are_pure(batch, spec, seed):
    """Inputs stay as they were, and the same call answers the same, whatever was asked in between."""
    policy = kvprune.get_policy(spec)
    views = []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Spy(kvprune.CrossKVPolicy):
        name = "spy"

        @property
        def needs(self):
            return frozenset({"queries", "raw_keys"})

        def select(self, view):
            views.append(copy.deepcopy(view))
            return Decision()

    prefill(Spy(), mllama_inputs(batch), seed)
    before = copy.deepcopy(views)
    forwards = [policy.select(view) for view in views]
    backwards = [policy.select(view) for view in reversed(views)][::-1]
    assert forwards == backwards
    for view, original in zip(views, before, strict=True):
        for name in ("keys", "values", "queries", "raw_keys", "live", "visible"):
            assert torch.equal(getattr(view, name), getattr(original, name))
        assert torch.equal(view.visibility.rows, original.visibility.rows)


def test_kv10_the_same_seed_draws_the_same_and_another_seed_does_not():
    inputs = mllama_inputs(["4ttt", "4ttt"])
    first, again, other = (prefill("random:keep_ratio=0.3", inputs, seed) for seed in (1, 1, 2))
    assert first.selections == again.selections
    assert first.selections[1] != other.selections[1]
    assert first.selections[1] != first.selections[3]  # layers differ
    assert not torch.equal(first.selections[1].indices[0], first.selections[1].indices[1])  # samples differ


@pytest.mark.parametrize("sequences", [60, pytest.param(400, marks=pytest.mark.slow)])
def test_kv11_any_sequence_of_operations_keeps_tensors_and_selection_together(sequences):
    """Fill, append, decode, retain, reorder, expand, select, crop, reset, copy, move (cache_machine.py)."""
    run_state_machine_as_test(
        CacheMachine, settings=settings(max_examples=sequences, stateful_step_count=15, deadline=None)
    )


def fingerprint_of(model):
    """Everything that an attachment could change: hooks, attributes, parameters, attention tables."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    hooks = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_backward_hooks",
    )
    state = []
    for name, module in model.named_modules():
        state.append((name, type(module), module.forward.__func__, sorted(module.__dict__)))
        state.append([(hook, len(getattr(module, hook))) for hook in hooks])
        state.append(
            [(k, v) for k, v in sorted(module.__dict__.items()) if isinstance(v, (bool, int, float, str))]
        )
    state.append(sorted(ALL_ATTENTION_FUNCTIONS.keys()))
    state.append([(name, parameter.data_ptr()) for name, parameter in model.named_parameters()])
    state.append(model.config.to_dict())
    return state


@pytest.mark.parametrize("make", [mllama, bart, whisper])
@pytest.mark.parametrize("spec", ["full", "norm:of=raw_keys", "trim"])
def test_kv12_the_model_is_as_before_after_exit(make, spec):
    model = make()
    before = fingerprint_of(model)
    run = kvprune.compress(model, spec)
    assert fingerprint_of(model) == before
    with run:
        assert fingerprint_of(model) != before
        with pytest.raises(NestedCompressionError, match="is being compressed already"):
            kvprune.compress(model, "lossless").attach()
    assert fingerprint_of(model) == before


@pytest.mark.parametrize("spec", ["lossless", "trim"])
def test_kv12_also_after_an_exception_inside_generate(spec, monkeypatch):
    model, inputs = mllama(), mllama_inputs(["tt4ttt"])
    before = fingerprint_of(model)
    _, expected, _ = generate(model, inputs)
    for raising in (model.model.language_model.layers[3].mlp, model.lm_head, model.model.vision_model):
        handle = raising.register_forward_hook(lambda *call: (_ for _ in ()).throw(MemoryError("boom")))
        with pytest.raises(MemoryError, match="boom"), kvprune.compress(model, spec):
            generate(model, inputs)
        handle.remove()
        assert fingerprint_of(model) == before
    _, logits, _ = generate(model, inputs)
    assert torch.equal(logits, expected)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    batches, st.sampled_from(POLICIES), st.sampled_from([(1, 3, 5), (2, 4), (1,)]), st.sampled_from([1, 2])
)
def test_kv13_the_master_oracle(batch, spec, cross_layers, beams):
    """Pruned generation equals the untouched model with the dropped columns masked, here in float64."""
    model = mllama(torch.float64, "sdpa", cross_layers)
    inputs = mllama_inputs(batch, dtype=torch.float64)
    assert difference_to_oracle(model, inputs, spec, steps=4, num_beams=beams) <= TOLERANCE[torch.float64]


@few
@given(batches, ranking, ratios, ratios)
def test_kv14_a_larger_budget_keeps_a_superset(batch, spec, one, other):
    small, large = sorted((one, other))
    inputs = mllama_inputs(batch)
    less, more = (prefill(with_ratio(spec, ratio), inputs) for ratio in (small, large))
    first = min(less.selections)  # deeper layers of an onward policy see other inputs
    for layer_idx in less.selections if "onward" not in spec and spec != "trim" else [first]:
        kept, kept_more = less.selections[layer_idx].to_mask(), more.selections[layer_idx].to_mask()
        assert (kept_more | ~kept).all()


@pytest.mark.parametrize(
    ("invariant", "kept"),
    [("KV04", [False, False, True, True]), ("KV03", [True, True, False, False])],
)
def test_a_decision_that_breaks_an_invariant_is_refused_by_its_id(invariant, kept):
    """Units: 0 and 1 are two visible images; 2 is padding (for KV04, unit 1 is the padding)."""
    from kvprune.policy.checks import check_decision
    from kvprune.policy.view import LayerView

    rows = torch.tensor([[[True, invariant == "KV03"]]])
    visibility = Visibility(
        rows=rows,
        units=torch.tensor([[0, 0, 1, 1]]),
        images=torch.tensor([0, 1]),
        live=torch.tensor([[True]]),
    )
    view = LayerView(
        keys=torch.zeros(1, 2, 4, 3),
        values=torch.zeros(1, 2, 4, 3),
        visibility=visibility,
        layer_idx=3,
        rank=0,
        num_layers=2,
        scaling=1.0,
    )
    decision = Decision(cache=Selection.from_mask(torch.tensor([[kept]])))
    with pytest.raises(SelectionError, match=f"{invariant}: policy 'mine' at layer 3"):
        check_decision(decision, view, "mine")


@few
@given(batches, ratios, st.booleans(), st.sampled_from(["tile", "image"]))
def test_kv15_merging_is_a_partition_that_preserves_mass(batch, ratio, bias, borders):
    model, inputs = mllama(torch.float64), mllama_inputs(batch, dtype=torch.float64)
    seen = seen_by_decoding(inputs)
    seen[~seen.any(-1)] = True  # a sample without an image attends to everything
    with torch.no_grad():
        stock = model(**inputs, use_cache=True).past_key_values
        with kvprune.compress(model, f"elastic:keep_ratio={ratio},size_bias={bias},borders={borders}") as run:
            cache = model(**inputs, use_cache=True).past_key_values
    per_image = seen.shape[-1] // inputs["cross_attention_mask"].shape[2]
    for layer_idx, selection in run.selections.items():
        if selection.merge is None:
            continue
        for sample in range(len(batch)):
            into = selection.merge.into[sample, 0].tolist()
            members = {
                entry: [c for c, into_it in enumerate(into) if into_it == entry] for entry in set(into)
            }
            dropped = members.pop(-1, [])
            mass = torch.zeros(2, 8, dtype=torch.float64)
            for entry, columns in members.items():
                anchor = int(selection.indices[sample, 0, entry])
                assert anchor in columns
                assert {column // per_image for column in columns} == {anchor // per_image}
                mass += len(columns) * cache.layers[layer_idx].values[sample, :, entry]
            assert inputs["cross_attention_mask"][sample].any() <= all(not seen[sample, c] for c in dropped)
            merged = [column for column in range(len(into)) if column not in dropped]
            wanted = stock.layers[layer_idx].values[sample][:, merged].sum(1)
            assert (mass - wanted).abs().max() < 1e-10
