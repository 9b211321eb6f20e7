"""Every declared family under policies that decide in decode steps: each step equals the oracle."""

from __future__ import annotations

import pytest
import torch
from decoder_pairs import PAIRS
from family_checks import MOST, installed, tiny_of
from long_speech import apart, long_whisper, transcribe
from step_policies import Fixed
from stepping import against_oracle

import kvprune
from kvprune.adapters.tiny.families import TINY_FAMILIES
from kvprune.errors import UnsupportedModelError
from kvprune.session.registry import find_adapter
from kvprune.testing import masked_oracle
from kvprune.testing.oracle_steps import masked_steps

STREAMS = ("ProphetNetForConditionalGeneration", "EncoderDecoderModel of ProphetNet")
"""Several streams read in one step, with one mask."""
ONLY_FLOAT32 = ("EncoderDecoderModel of XGLM", "EncoderDecoderModel of ProphetNet")
"""Stock transformers overflows in float64."""
QUICK = ("MusicgenForConditionalGeneration", "MvpForConditionalGeneration", "DiaForConditionalGeneration")
POLICIES = (Fixed(keep_ratio=0.5), kvprune.get_policy("quest:keep_ratio=0.5,page=2"))


def model_and_inputs(name):
    tiny = tiny_of(name)
    dtype = torch.float32 if name in ONLY_FLOAT32 else torch.float64
    model = tiny.model(name, dtype, "sdpa" if tiny.sdpa else "eager")
    return model, tiny.batch(dtype, tiny.pads), {"num_beams": 3} if tiny.beams else {}


def equals(name, **options):
    model, inputs, beams = model_and_inputs(name)
    most = MOST if name in ONLY_FLOAT32 else 1e-6
    for policy in POLICIES:
        assert against_oracle(model, inputs, policy, steps=4, **beams, **options) <= most, policy.spec


@pytest.mark.parametrize("name", installed(QUICK))
def test_a_class_equals_the_oracle_that_masks_per_step(name):
    equals(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", installed(name for name in [*TINY_FAMILIES, *PAIRS] if name not in (*STREAMS, *QUICK))
)
def test_every_other_class_does_too(name):
    equals(name)


@pytest.mark.parametrize("name", installed(STREAMS))
def test_rows_that_share_a_mask_are_refused(name):
    """When the block is made: no call of the model is needed to find out."""
    model, _, _ = model_and_inputs(name)
    for policy in (*POLICIES, "h2o:steps=2", "divprune then quest"):
        with pytest.raises(UnsupportedModelError, match=r"several streams .* takes one mask.*in prefill"):
            kvprune.compress(model, policy)
    kvprune.compress(model, "h2o")


def test_samples_without_condition_do_not_disturb_the_others():
    """Half of MusicGen's batch has nothing to read; with guidance its logits are mixed with the others."""
    equals("MusicgenForConditionalGeneration", guidance_scale=3.0)


@pytest.mark.parametrize(
    "use",
    [
        "batch",
        "words",
        *(
            pytest.param(use, marks=pytest.mark.slow)
            for use in ("fallback", "beams", "text before", "sequences")
        ),
    ],
)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_each_window_of_a_recording_equals_the_oracle(policy, use):
    """Each window is a prefill, whose steps are asked anew."""
    model = long_whisper()
    with kvprune.compress(model, policy) as run, run.recording() as kept:
        run.record_steps()
        found = transcribe(model, use)
    adapter = find_adapter(model)
    decode, prefill = [one.selections for one in kept], [one.prefill_selections for one in kept]
    with masked_oracle(model, decode, prefill), masked_steps(adapter(model).sites, run.step_reads):
        assert apart(found, transcribe(model, use)) <= 1e-6
    assert len(run.report.windows) == len(kept)
    for window in run.report.windows:
        assert 0.45 < window.read_of_visible < 0.55
        assert window.kept_per_sample == pytest.approx([1.0] * len(window.rows))
    assert [one["read_of_visible"] for one in run.report.to_dict()["windows"]] == [
        window.read_of_visible for window in run.report.windows
    ]
