"""Attention implementations, dtypes, where weights are, and training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from families import SPECS, compressed, inputs_of, model_of
from generation import difference_to_oracle, generate, tiny_bart, tiny_mllama, tiny_whisper
from surface_table import refused, works
from transformers.modeling_layers import GradientCheckpointingLayer

import kvprune
from kvprune.errors import NestedCompressionError, UnsupportedModelError
from kvprune.testing import masked_oracle

AREA, TRAINING = "Attention, dtype, placement", "Training"
TINY = {"Mllama": tiny_mllama, "BART": tiny_bart, "Whisper": tiny_whisper}


@works(AREA, "eager attention", "the oracle, float32")
def test_eager(family):
    model, inputs = model_of(family, torch.float32, "eager"), inputs_of(family, dtype=torch.float32)
    for spec in SPECS:
        assert difference_to_oracle(model, inputs, spec) <= 1e-5


_FLEX = """
import sys; sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
torch.compiler.set_stance("force_eager")  # compiled, it crashes the CPU build of torch
import kvprune
from families import compressed, inputs_of
from generation import tiny_mllama
from kvprune.errors import UnsupportedCacheError
inputs = inputs_of("Mllama", dtype=torch.float32)
flex, sdpa = (tiny_mllama(1, attn_implementation=name) for name in ("flex_attention", "sdpa"))
for spec in ("full", "trim:keep_ratio=0.3"):
    difference = compressed(flex, inputs, spec)[1] - compressed(sdpa, inputs, spec)[1]
    assert difference.abs().max() <= 1e-5, difference.abs().max()
try:
    compressed(flex, inputs, "norm:keep_ratio=0.3")
except UnsupportedCacheError as error:
    assert "mask of the first head" in str(error)
    print("both shown")
"""


@pytest.fixture(scope="module")
def flex() -> str:
    here = Path(__file__).parents[1]
    code = _FLEX.format(paths=[str(here), str(here / "support")])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    return done.stdout + done.stderr


@works(AREA, "flex attention, heads keep the same tokens", "sdpa, float32, uncompiled", families=("Mllama",))
def test_flex(family, flex):
    assert "both shown" in flex


@refused(
    AREA,
    "flex attention, heads keep different tokens",
    "transformers has one mask for all heads",
    ("Mllama",),
)
def test_flex_by_head(family, flex):
    assert "both shown" in flex


@works(AREA, "bfloat16 and float16", "the oracle up to 0.1 in the first logits (later tokens may flip)")
def test_half(family):
    for dtype in (torch.bfloat16, torch.float16):
        model, inputs = TINY[family](1, dtype=dtype), inputs_of(family, dtype=dtype)
        for spec in SPECS:
            _, logits, run = compressed(model, inputs, spec, steps=1)
            with masked_oracle(model, run.selections, run.prefill_selections):
                expected = generate(model, inputs, steps=1)[1]
            assert (logits - expected).abs().max() <= 0.1


@works(
    AREA,
    "accelerate dispatch to CPU and disk, before or after attaching",
    "the same weights in memory",
    ("Mllama",),
)
def test_dispatched(family, tmp_path):
    places = {
        "model.vision_model": "cpu",
        "model.multi_modal_projector": "cpu",
        "model.language_model": "disk",
    }
    inputs = inputs_of(family)
    for spec in SPECS:
        expected = compressed(model_of(family), inputs, spec)[1]
        for attach_first in (True, False):
            model = tiny_mllama(1, dtype=torch.float64)
            run = kvprune.compress(model, spec)
            if attach_first:
                run.attach()
            accelerate.dispatch_model(
                model,
                {**places, "lm_head": "cpu"},
                main_device="cpu",
                offload_dir=str(tmp_path),
                force_hooks=True,
            )
            assert next(model.model.language_model.parameters()).device.type == "meta"
            if not attach_first:
                run.attach()
            assert torch.equal(generate(model, inputs)[1], expected)
            run.detach()


@refused(AREA, "two compressions of one model at once", "leave the first block, or detach it")
def test_nested(family):
    model = model_of(family)
    with kvprune.compress(model, "trim"), pytest.raises(NestedCompressionError, match="compressed already"):
        kvprune.compress(model, "full").attach()


def _gradients(model, inputs, labels, context):
    model.zero_grad()
    with context as run:
        loss = model(**inputs, labels=labels).loss
        loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert gradients.norm() > 0.1
    return loss.detach(), gradients, run


def _compare_gradients(family, checkpointing):
    model, inputs = TINY[family](1, dtype=torch.float64), inputs_of(family)
    model.train()
    labels = inputs["input_ids"].clamp(max=63) if family == "Mllama" else torch.full((3, 4), 7)
    for spec in ("full", "trim:keep_ratio=0.3", "norm:keep_ratio=0.3,reach=onward"):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        loss, found, run = _gradients(model, inputs, labels, kvprune.compress(model, spec))
        model.gradient_checkpointing_disable()
        torch.manual_seed(0)
        oracle = masked_oracle(model, run.selections, run.prefill_selections)
        expected_loss, expected, _ = _gradients(model, inputs, labels, oracle)
        assert abs(loss - expected_loss) <= 1e-9
        assert (found - expected).abs().max() <= 1e-9


@works(TRAINING, "forward and backward", "loss and gradients of the oracle")
def test_training(family):
    _compare_gradients(family, checkpointing=False)


@works(
    TRAINING,
    "gradient checkpointing (transformers 5.23; not reentrant, as in stock)",
    "loss and gradients of the oracle; policies must decide onward",
    families=("Mllama",),
)
@pytest.mark.skipif("__call__" in GradientCheckpointingLayer.__dict__, reason="refused in this release")
def test_checkpointing(family):
    _compare_gradients(family, checkpointing=True)


@refused(
    TRAINING, "gradient checkpointing of encoder-decoder models", "train without it", ("BART", "Whisper")
)
def test_checkpointing_encoder_decoder(family):
    with pytest.raises(UnsupportedModelError, match="gradient_checkpointing_disable"):
        _compare_gradients(family, checkpointing=True)


@refused(
    TRAINING,
    "gradient checkpointing where it replays hooks (transformers 5.17)",
    "train without it",
    ("Mllama",),
)
@pytest.mark.skipif("__call__" not in GradientCheckpointingLayer.__dict__, reason="works in this release")
def test_checkpointing_that_replays(family):
    with pytest.raises(UnsupportedModelError, match="gradient_checkpointing_disable"):
        _compare_gradients(family, checkpointing=True)
