"""Families with their own processors, from files of pictures and recordings to texts.

Model and processor are written to a folder and loaded again, as users load them from a hub.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from own_processors import FAMILIES, Loaded, load

import kvprune
from kvprune.errors import UnsupportedModelError
from kvprune.session.registry import find_adapter
from kvprune.testing import masked_oracle

pytestmark = pytest.mark.usefixtures("quiet")

MOST = 1e-5
"""Largest difference of logits in float32, relative to the largest logit."""

BY_HEAD, ONWARD = "norm:keep_ratio=0.3", "divprune:keep_ratio=0.3"
"""Policies that decide for each head, and from features before the first layer."""

Folder = Callable[[str], Path]


def generate(own: Loaded, inputs: dict[str, Any], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sequences and logits ``[steps, rows, V]``."""
    out = own.model.generate(
        **inputs,
        **own.options,
        **{"max_new_tokens": 7, "min_new_tokens": 4, "do_sample": False, **options},
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out["sequences"], torch.stack(list(out["logits"]))


def check(own: Loaded, samples: Sequence[Path], specs: Sequence[str], **options: Any) -> None:
    """Compare a family with stock transformers and with the oracle."""
    inputs = own.inputs(samples)
    sequences, stock = generate(own, inputs, **options)
    with kvprune.compress(own.model, "full") as full:
        same, logits = generate(own, inputs, **options)
    assert torch.equal(same, sequences)
    assert torch.equal(logits, stock)
    assert full.report.bytes_held <= full.report.bytes_full
    for spec in specs:
        with kvprune.compress(own.model, spec) as run:
            got, logits = generate(own, inputs, **options)
        assert run.report.prefills == 1, spec
        with masked_oracle(
            own.model, run.selections, run.prefill_selections, adapter=find_adapter(own.model)
        ):
            expected, wanted = generate(own, inputs, **options)
        assert torch.equal(got, expected), spec
        largest = wanted.abs().max()
        assert (logits - wanted).abs().max() <= MOST * largest, spec
        texts = own.texts(got)
        assert texts == own.texts(expected), spec
        assert all(texts), spec
        assert run.report.bytes_held < 0.5 * full.report.bytes_held, spec
        # The model depends on what it attends to, so the comparison above says something.
        assert logits.shape != stock.shape or (logits - stock).abs().max() > 1e-3 * largest, spec


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_with_its_own_processor_equals_stock_and_the_oracle(
    name: str, folder_of: Folder, pictures: list[Path]
) -> None:
    own = load(name, folder_of(name))
    check(own, pictures[:1], (BY_HEAD, ONWARD))
    check(own, pictures[:2], (BY_HEAD, ONWARD), num_beams=3)


MORE = "trim:keep_ratio=0.3", "h2o:keep_ratio=0.3"


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_equals_the_oracle_under_more_policies(
    name: str, attention: str, folder_of: Folder, pictures: list[Path]
) -> None:
    try:
        own = load(name, folder_of(name), attn_implementation=attention)
    except ValueError as error:
        pytest.skip(str(error)[:80])  # stock transformers has no SDPA for a part of it
    for options in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        check(own, pictures, (BY_HEAD, ONWARD, *MORE), **options)


PADDED = "Florence-2", "Pix2Struct", "Moonshine", "Speech2Text", "SeamlessM4T", "T5", "NLLB", "Marian"
"""Families whose processor pads the shorter sample of a batch, and says so in a mask."""


@pytest.mark.parametrize("name", PADDED)
def test_lossless_drops_what_the_processor_padded(name: str, folder_of: Folder, pictures: list[Path]) -> None:
    own = load(name, folder_of(name))
    inputs = own.inputs(pictures[:2])
    shorter = int(inputs["attention_mask"].sum(-1).argmin())
    assert 0 in inputs["attention_mask"][shorter]
    _, stock = generate(own, inputs)
    with kvprune.compress(own.model, "lossless") as run:
        _, logits = generate(own, inputs)
    assert (logits - stock).abs().max() <= MOST * stock.abs().max()
    assert run.report.kept_fraction == 1
    kept = run.selections[0].valid.sum(-1).flatten().tolist()
    assert min(kept) == kept[shorter] < max(kept)


# The other encoders of speech hear the padding of a batch: their convolutions and norms know no mask.
@pytest.mark.parametrize("name", ["Pix2Struct", "Florence-2", "SeamlessM4T", "T5", "NLLB"])
def test_a_sample_selects_alone_what_it_selects_in_a_batch(
    name: str, folder_of: Folder, pictures: list[Path]
) -> None:
    own = load(name, folder_of(name))
    together, alone = (own.inputs(pictures[:2]), own.inputs(pictures[:1]))
    for spec in (BY_HEAD, ONWARD):
        kept = []
        for inputs in (together, alone):
            with kvprune.compress(own.model, spec) as run:
                generate(own, inputs)
            held = run.selections[0]
            kept.append([row[ok].tolist() for row, ok in zip(held.indices[0], held.valid[0], strict=True)])
        assert kept[0] == kept[1], spec


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("BLIP", "UDOP", "Pix2Struct") else pytest.param(name, marks=pytest.mark.slow)
        for name in FAMILIES
    ],
)
def test_the_last_token_is_read_again(name: str, folder_of: Folder, pictures: list[Path]) -> None:
    """BLIP's decoder wraps the cache that it is given, and UDOP's returns a mask."""
    own = load(name, folder_of(name))
    inputs = own.inputs(pictures[:2])
    stock, _ = generate(own, inputs)
    for spec in ("full", BY_HEAD, ONWARD):
        with kvprune.compress(own.model, spec, reread=True) as run:
            got, logits = generate(own, inputs)
        assert run.report.rereads == 1
        seen = run.selections, run.prefill_selections
        with masked_oracle(own.model, *seen, adapter=find_adapter(own.model), reread=True):
            expected, wanted = generate(own, inputs)
        assert torch.equal(got, expected), spec
        assert (logits - wanted).abs().max() <= MOST * wanted.abs().max(), spec
        if spec == "full":
            assert torch.equal(got, stock)
        else:
            assert run.report.bytes_held < 0.5 * run.report.bytes_full


def equals_the_oracle(own: Loaded, inputs: dict[str, Any], spec: str, **options: Any) -> int:
    """Compare with the oracle, and return the number of encoder columns."""
    with kvprune.compress(own.model, spec) as run:
        got, _ = generate(own, inputs, **options)
    with masked_oracle(own.model, run.selections, run.prefill_selections, adapter=find_adapter(own.model)):
        expected, _ = generate(own, inputs, **options)
    assert torch.equal(got, expected)
    assert run.report.bytes_held < 0.5 * run.report.bytes_full
    return run.selections[0].columns


SMALL, LARGE = {"height": 32, "width": 32}, {"height": 96, "width": 64}


@pytest.mark.parametrize(
    ("name", "sizes", "columns", "options"),
    [
        ("Pix2Struct", [{"max_patches": 24}, {"max_patches": 50}], [24, 50], {}),
        ("Donut", [{"size": SMALL}, {"size": LARGE}], [16, 96], {}),
        ("TrOCR", [{}, {"size": LARGE}], [17, 97], {"interpolate_pos_encoding": True}),
    ],
)
def test_one_model_reads_pages_of_several_sizes(
    name: str,
    sizes: list[dict[str, Any]],
    columns: list[int],
    options: dict[str, Any],
    folder_of: Folder,
    pictures: list[Path],
) -> None:
    own = load(name, folder_of(name))
    own.processor.image_processor.is_vqa = False  # Pix2Struct needs no question
    pages = own.open(pictures[:2])
    inputs = [dict(own.processor(images=pages, return_tensors="pt", **size)) for size in sizes]
    assert [equals_the_oracle(own, one, BY_HEAD, **options) for one in inputs] == columns
    with kvprune.compress(own.model, ONWARD) as run:
        for count, one in zip(columns, inputs, strict=True):
            generate(own, one, **options)
            assert run.selections[0].columns == count
    assert run.report.prefills == 2


def test_prompts_of_the_decoder_of_several_lengths(folder_of: Folder, pictures: list[Path]) -> None:
    own = load("Donut", folder_of("Donut"))
    own.tokenizer.padding_side = "left"
    texts = ["<s_page> he was", "<s_page> an amiable man on the page"]
    prompt = own.tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    inputs = {
        **own.inputs(pictures[:2]),
        "decoder_input_ids": prompt.input_ids,
        "decoder_attention_mask": prompt.attention_mask,
    }
    for spec in (BY_HEAD, "trim:keep_ratio=0.3"):
        equals_the_oracle(own, inputs, spec, num_beams=2)


class TestBlip:
    """BLIP's ``generate`` calls that of its text decoder, a part of the model that users compress."""

    @pytest.fixture
    def own(self, folder_of: Folder) -> Loaded:
        return load("BLIP", folder_of("BLIP"))

    @pytest.mark.parametrize("spec", ["full", BY_HEAD])
    def test_beams_hold_a_picture_once(self, own: Loaded, pictures: list[Path], spec: str) -> None:
        held = {}
        for beams in (1, 3):
            with kvprune.compress(own.model, spec) as run:
                generate(own, own.inputs(pictures[:2]), num_beams=beams)
            held[beams] = run.report.bytes_held
        assert held[1] == held[3]

    @pytest.mark.parametrize("spec", ["trim:keep_ratio=0.2", BY_HEAD])
    def test_drafts_stay_out_of_the_prefill(self, own: Loaded, pictures: list[Path], spec: str) -> None:
        words = "a picture of a red circle a picture of a red circle a picture of"
        inputs = own.processor(images=own.open(pictures[:1]), text=words, return_tensors="pt")
        answers = []
        for options in ({}, {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}):
            with kvprune.compress(own.model, spec) as run:
                answers.append(own.model.generate(**inputs, max_new_tokens=12, do_sample=False, **options))
            assert run.report.prefills == 1
        assert torch.equal(*answers)

    @pytest.mark.parametrize("side", ["right", "left"])
    def test_texts_of_several_lengths(self, own: Loaded, pictures: list[Path], side: str) -> None:
        own.tokenizer.padding_side = side
        texts = ["a picture of", "what is on the page? a picture of a red circle"]
        inputs = own.processor(images=own.open(pictures[:2]), text=texts, padding=True, return_tensors="pt")
        for spec in (BY_HEAD, "trim:keep_ratio=0.3"):
            with kvprune.compress(own.model, spec) as run:
                got, _ = generate(own, {name: value.clone() for name, value in inputs.items()})
            with masked_oracle(
                own.model, run.selections, run.prefill_selections, adapter=find_adapter(own.model)
            ):
                expected, _ = generate(own, {name: value.clone() for name, value in inputs.items()})
            assert torch.equal(got, expected)

    def test_a_prompt_in_chunks_is_refused(self, own: Loaded, pictures: list[Path]) -> None:
        with (
            kvprune.compress(own.model, BY_HEAD),
            pytest.raises(UnsupportedModelError, match="prefill_chunk_size=2 passes the prompt of BLIP"),
        ):
            generate(own, own.inputs(pictures[:2]), prefill_chunk_size=2)


@pytest.mark.parametrize("name", ["Florence-2", "Moonshine"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_a_device_map(
    name: str, dtype: torch.dtype, folder_of: Folder, pictures: list[Path]
) -> None:
    own = load(name, folder_of(name), dtype=dtype, device_map="cpu")
    inputs = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in own.inputs(pictures[:2]).items()
    }
    sequences, stock = generate(own, inputs)
    with kvprune.compress(own.model, "full") as run:
        same, logits = generate(own, inputs)
    assert torch.equal(same, sequences)
    assert torch.equal(logits, stock)
    with kvprune.compress(own.model, BY_HEAD) as run:
        _, logits = generate(own, inputs)
    with masked_oracle(own.model, run.selections, run.prefill_selections):
        _, wanted = generate(own, inputs)
    assert (logits[0] - wanted[0]).abs().max() <= 0.02 * wanted[0].abs().max()  # later tokens may flip
    assert run.report.bytes_held < 0.5 * run.report.bytes_full


@pytest.mark.parametrize("first", [True, False])
def test_weights_that_accelerate_moves_in_and_out(
    first: bool, folder_of: Folder, pictures: list[Path]
) -> None:
    """Accelerate wraps the forward call of each module, before or after kvprune has looked at it."""
    from accelerate import cpu_offload

    name = "Florence-2"
    own = load(name, folder_of(name))
    inputs = own.inputs(pictures[:2])
    with kvprune.compress(own.model, BY_HEAD):
        expected, _ = generate(own, inputs)
    run = None if first else kvprune.compress(own.model, BY_HEAD)
    cpu_offload(own.model, execution_device=torch.device("cpu"))
    with run or kvprune.compress(own.model, BY_HEAD) as run:
        got, _ = generate(own, inputs)
    assert torch.equal(got, expected)
    assert run.report.bytes_held < 0.5 * run.report.bytes_full
