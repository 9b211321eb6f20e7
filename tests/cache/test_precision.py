"""Precision in whole runs: against the oracle, in bytes, over turns, and where it is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
import torch
from families import inputs_of, model_of, rows_so_far
from generation import LAYOUTS, TOLERANCE, difference_to_oracle, generate, mllama

import kvprune
from kvprune import Decision, LayerView, Selection
from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.errors import QuantizationError, SelectionError, UnsupportedCacheError
from kvprune.testing import masked_oracle, mllama_inputs
from kvprune.tokens.merging import Merge

DTYPES = [torch.float32, torch.float64]


@dataclass(frozen=True, kw_only=True)
class Mixed(kvprune.CrossKVPolicy):
    """Each visible token, or each head's, is dropped or held in some precision, as chance has it."""

    by_head: bool = True
    lowest: Literal[16, 8, 4, 2] = 2

    name: ClassVar[str] = "mixed"

    def select(self, view: LayerView) -> Decision:
        draws = view.random(view.heads if self.by_head else 1)
        bits = torch.tensor([0, 2, 4, 8, 16], dtype=torch.uint8)[(draws * 5).long()].to(view.device)
        bits = torch.where((bits > 0) & (bits < self.lowest), self.lowest, bits)
        first = torch.zeros_like(view.visible).scatter_(
            1, view.visible.to(torch.uint8).argmax(1)[:, None], True
        )
        kept = (view.visible[:, None] & (bits > 0)) | first[:, None]
        for group in range(int(view.groups.max()) + 1):  # KV03
            of_group = (view.groups == group)[:, None] & view.visible[:, None]
            kept |= of_group & ~(kept & of_group).any(-1, keepdim=True)
        return Decision(cache=Selection.from_mask(kept, torch.where(bits == 0, 4, bits).to(torch.uint8)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("by_head", [True, False])
def test_mllama_equals_the_oracle(layout, dtype, by_head):
    found = difference_to_oracle(mllama(dtype), mllama_inputs(layout, dtype=dtype), Mixed(by_head=by_head))
    assert found <= TOLERANCE[dtype]


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_equal_the_oracle_and_share_what_is_held(options):
    inputs = mllama_inputs(LAYOUTS[2], dtype=torch.float64)
    assert difference_to_oracle(mllama(torch.float64), inputs, Mixed(), **options) <= 1e-6
    with kvprune.compress(mllama(), Mixed()) as one:
        generate(mllama(), mllama_inputs(LAYOUTS[2]))
    with kvprune.compress(mllama(), Mixed()) as several:
        generate(mllama(), mllama_inputs(LAYOUTS[2]), **options)
    assert several.report.bytes_held == one.report.bytes_held


@pytest.mark.parametrize("family", ["BART", "Whisper"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_encoder_decoder_models_equal_the_oracle(family, options):
    assert difference_to_oracle(model_of(family), inputs_of(family), Mixed(), **options) <= 1e-6


def test_low_precision_is_no_no_op():
    """The oracle without the bits is another model: what the tests above compare is there to be seen."""
    model, inputs = mllama(torch.float64), mllama_inputs(("4ttt",), dtype=torch.float64)
    with kvprune.compress(model, Mixed()) as run:
        _, logits, _ = generate(model, inputs)
    plain = {index: Selection.from_mask(one.to_mask()) for index, one in run.selections.items()}
    with masked_oracle(model, plain, run.prefill_selections):
        _, expected, _ = generate(model, inputs)
    apart = (logits - expected).abs().flatten(1).amax(1)
    assert apart[0] == 0  # prefill attends in full precision
    assert apart[1] > 1e-3


def test_every_byte_is_counted():
    model = mllama()
    with kvprune.compress(model, "zipvl:high_bits=8,low_bits=2,high_ratio=0.25") as run:
        _, _, cache = generate(model, mllama_inputs(("4ttt",)))
    report = run.report
    # 2 heads of 8 channels, keys and values: 5 entries of 8 bytes, 15 of 2, and two ends of 4 for each.
    per_layer = 2 * 2 * (5 * (8 + 8) + 15 * (2 + 8))
    assert [layer.bytes_held for layer in report.layers] == [per_layer] * 3
    assert report.bytes_full == 3 * 2 * 2 * 20 * 8 * 4
    assert report.verify() == report.bytes_held == 3 * per_layer
    assert [layer.widths for layer in report.layers] == [{"8": 5, "2": 15}] * 3
    assert report.kept_fraction == 1
    assert "5 at 8, 15 at 2" in str(report)
    assert "held by bits" in str(report)
    for index in (1, 3, 5):
        layer = cache.layers[index]
        assert sum(t.untyped_storage().nbytes() for p in layer.pools for t in p.tensors) == per_layer
        assert layer.keys.untyped_storage().nbytes() == 4  # one number stands for no entry
    with kvprune.compress(model, "norm:keep_ratio=0.5") as plain:
        generate(model, mllama_inputs(("4ttt",)))
    assert "held by bits" not in str(plain.report)
    assert plain.report.layers[0].widths == {"16": 10}


def test_a_later_image_attends_to_what_is_quantized_and_leaves_it_so():
    """Two prefills on one cache, each against the oracle on a stock cache."""
    model, inputs = mllama(torch.float64), mllama_inputs(("4tt1tt",), dtype=torch.float64)
    mask = inputs["cross_attention_mask"]
    second = int(mask[0, :, 1].any(-1).nonzero()[0])  # the row where the second image comes
    both = torch.ones_like(mask[:, second:])  # they stay in sight
    pictures = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    turns = [
        {
            "input_ids": inputs["input_ids"][:, :second],
            "attention_mask": inputs["attention_mask"][:, :second],
            "cross_attention_mask": mask[:, :second, :1],
            **{name: inputs[name][:, :1] for name in pictures},
        },
        {
            "input_ids": inputs["input_ids"][:, second:],
            "attention_mask": inputs["attention_mask"],
            "cross_attention_mask": both,
            **{name: inputs[name][:, 1:] for name in pictures},
        },
    ]
    cache, stock, bits = None, None, []
    for turn in turns:
        with kvprune.compress(model, Mixed()) as run, torch.no_grad():
            out = model(**turn, past_key_values=cache, use_cache=True)
        with masked_oracle(model, run.selections, run.prefill_selections), torch.no_grad():
            before = 0 if stock is None else second
            plain = turn | {"cross_attention_mask": rows_so_far(turn["cross_attention_mask"], before)}
            expected = model(**plain, past_key_values=stock, use_cache=True)
        cache, stock = out.past_key_values, expected.past_key_values
        assert (out.logits - expected.logits).abs().max() <= 1e-6
        bits.append(run.selections[3].bits_by_column())
    assert cache.layers[3].columns == 40
    assert torch.equal(bits[1][..., :20], bits[0])
    assert len(bits[1][..., 20:].unique()) > 1  # the decision about the new image applies to it
    assert run.prefill_selections[3].quantizes


def test_nothing_is_quantized_without_a_cache():
    with (
        pytest.raises(UnsupportedCacheError, match="without a cache"),
        kvprune.compress(mllama(), Mixed()),
        torch.no_grad(),
    ):
        mllama()(**mllama_inputs(("4ttt",)), use_cache=False)


def test_a_call_that_records_gradients_is_warned():
    with kvprune.compress(mllama(), Mixed()) as run:
        mllama()(**mllama_inputs(("4ttt",)), use_cache=True)
    assert any("carry no gradient" in text for text in run.report.warnings)


def filled(columns: int = 4) -> CrossKVLayer:
    layer = CrossKVLayer()
    keys = torch.arange(columns * 8.0).reshape(1, 1, columns, 8)
    layer.update(keys, -keys)
    return layer


def in_four_bits() -> Selection:
    every = torch.ones(1, 1, 4, dtype=torch.bool)
    return Selection.from_mask(every, torch.full((1, 1, 4), 4, dtype=torch.uint8))


def test_what_is_not_finite_is_not_quantized():
    layer = filled()
    layer.keys[0, 0, 1, 2] = torch.nan
    with pytest.raises(QuantizationError, match="must be finite"):
        layer.retain(in_four_bits())


def test_quantized_entries_are_not_merged():
    layer, every = filled(), torch.ones(1, 1, 4, dtype=torch.bool)
    layer.retain(in_four_bits())
    merge = Merge(torch.arange(4).expand(1, 1, 4), torch.ones(1, 1, 4))
    with pytest.raises(UnsupportedCacheError, match="quantized, and a later decision merges"):
        layer.retain(Selection(torch.arange(4).expand(1, 1, 4), every, 4, merge))
    with pytest.raises(SelectionError, match="has either a merge or bits, got both"):
        Selection(
            torch.arange(4).expand(1, 1, 4), every, 4, merge, torch.full((1, 1, 4), 4, dtype=torch.uint8)
        )


def parts(**changes):
    made = {
        "indices": torch.tensor([[[0, 2, 4], [1, 3, 3]]]),
        "valid": torch.tensor([[[True, True, True], [True, True, False]]]),
        "columns": 5,
        "bits": torch.tensor([[[16, 8, 4], [2, 8, 8]]], dtype=torch.uint8),
    }
    return made | changes


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        (
            torch.tensor([[[16, 8, 3], [2, 8, 8]]], dtype=torch.uint8),
            r"are 16, 8, 4 or 2 .*, got 3",
        ),
        (
            torch.tensor([[[16, 8, 0], [2, 8, 8]]], dtype=torch.uint8),
            r"are 16, 8, 4 or 2 .*, got 0",
        ),
        (torch.tensor([[[16, 8, 4], [2, 8, 4]]], dtype=torch.uint8), "padding repeats the bits"),
        (
            torch.tensor([[[16, 8, 4], [2, 8, 8]]]),
            r"uint8 with the shape of indices \[1, 2, 3\], got torch.int64",
        ),
        (torch.tensor([[[16, 8, 4]]], dtype=torch.uint8), r"got torch.uint8 \[1, 1, 3\]"),
        ([[[16, 8, 4], [2, 8, 8]]], "tensor or None, got list"),
    ],
)
def test_bits_of_a_selection_are_checked(bits, message):
    with pytest.raises(SelectionError, match=message):
        Selection(**parts(bits=bits))


def test_a_selection_carries_its_bits():
    selection = Selection(**parts())
    kept = torch.tensor([[[1, 0, 1, 0, 1], [0, 1, 0, 1, 0]]], dtype=torch.bool)
    by_column = torch.tensor([[[16, 16, 8, 16, 4], [16, 2, 16, 8, 16]]], dtype=torch.uint8)
    assert selection == Selection.from_mask(kept, by_column)
    assert torch.equal(selection.bits_by_column(), by_column)
    assert selection.quantizes
    assert torch.equal(selection.repeat(3).bits_by_column(), by_column.expand(3, -1, -1))
    assert selection.repeat(3).every(3) == selection
    assert repr(selection).endswith("columns=5, bits=16/8/4/2)")
    assert selection != Selection(**parts(bits=None))
    own = Selection(**parts(bits=torch.full((1, 2, 3), 16, dtype=torch.uint8)))
    assert own == Selection(**parts(bits=None))  # None says the same
    assert not own.quantizes
    # What is said of columns that are not kept does not matter.
    assert Selection.from_mask(kept, torch.where(kept, by_column, 3).to(torch.uint8)) == selection


@pytest.mark.parametrize(
    "bits", [torch.full((1, 2, 4), 4, dtype=torch.uint8), torch.full((1, 2, 5), 4), "4", torch.tensor(4)]
)
def test_a_mask_takes_bits_of_its_shape_only(bits):
    with pytest.raises(SelectionError, match="bits of columns are"):
        Selection.from_mask(torch.ones(1, 2, 5, dtype=torch.bool), bits)


def test_features_have_no_precision():
    bits = torch.full((1, 1, 3), 4, dtype=torch.uint8)
    onward = Selection.from_mask(torch.ones(1, 1, 3, dtype=torch.bool), bits)
    with pytest.raises(SelectionError, match="features passed onward are not cached"):
        Decision(onward=onward)
    assert Decision(cache=onward).cache is onward
