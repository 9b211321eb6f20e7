"""What a batch may hold."""

from __future__ import annotations

import torch
from families import SPECS, compressed, inputs_of, model_of
from generation import difference_to_oracle, generate
from surface_table import works

from kvprune.testing import mllama_inputs

AREA = "Prompts"
MLLAMA = ("Mllama",)


def check(layouts):
    for spec in SPECS:
        inputs = mllama_inputs(layouts, dtype=torch.float64)
        assert difference_to_oracle(model_of("Mllama"), inputs, spec) <= 1e-6


@works(AREA, "batches: left padding in Mllama, padded encoder input in BART", "the oracle")
def test_padding(family):
    for spec in SPECS:
        assert difference_to_oracle(model_of(family), inputs_of(family, "ragged"), spec) <= 1e-6


@works(AREA, "images of 1 to 4 tiles in one batch", "the oracle", MLLAMA)
def test_tiles(family):
    check(["tt1ttt", "tt2ttt", "tt3ttt", "tt4ttt"])


@works(AREA, "several images, adjacent or not, different numbers of them", "the oracle", MLLAMA)
def test_several_images(family):
    check(["tt4tt1tt", "t2tt", "14ttt"])


@works(AREA, "interleaved chats: text sees the latest image only", "the oracle", MLLAMA)
def test_interleaved(family):
    check(["tt1ttt4tt"])


@works(
    AREA,
    "samples without an image in a mixed batch",
    "the oracle (stock lets them attend to everything)",
    MLLAMA,
)
def test_mixed(family):
    check(["tt4tt", "tttt", "2ttt"])


@works(AREA, "text only", "stock, bit for bit; the policy is not asked", MLLAMA)
def test_text_only(family):
    inputs = mllama_inputs(["ttttt", "ttt"])
    expected = generate(model_of("Mllama", torch.float32), inputs)[1]
    for spec in SPECS:
        _, logits, run = compressed(model_of("Mllama", torch.float32), inputs, spec)
        assert torch.equal(logits, expected)
        assert run.report.encoder_inputs == 0


@works(AREA, "equal samples in one batch", "the oracle; each has a selection of its own")
def test_equal_samples(family):
    inputs = {name: value.repeat_interleave(2, 0) for name, value in inputs_of(family).items()}
    for spec in SPECS:
        assert difference_to_oracle(model_of(family), inputs, spec) <= 1e-6
    held = compressed(model_of(family), inputs, "trim")[2].report.bytes_held
    assert held == 2 * compressed(model_of(family), inputs_of(family), "trim")[2].report.bytes_held
